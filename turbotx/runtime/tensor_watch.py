"""Tensor watch: whether any of many tensors was changed or moved since it was last asked.

In: tensors. Out: one native call that compares every address and version, where asking each
tensor from Python takes a quarter of a microsecond; a BERT has two hundred parameters::

    watch = make_watch(native, parameters)
    watch.changed()  ->  False
"""

from __future__ import annotations

import ctypes
import functools
import operator
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from turbotx.errors import TurbotxError
from turbotx.kernels.build import build_library, cache_directory
from turbotx.runtime.abi import RUNTIME_SOURCES, declare_watch

VERSION_SYMBOL = "_ZNK2at10TensorBase8_versionEv"
"""at::TensorBase::_version() as GCC and Clang name it: PyTorch's C interface does not have it."""


class TensorWatch:
    """Addresses and versions of tensors as they were when this was made."""

    def __init__(self, native: ctypes.CDLL, torch_library: ctypes.CDLL, tensors: Any) -> None:
        self._native, self._torch = native, torch_library
        count = len(tensors)
        capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
        self._handles = (ctypes.c_void_p * count)(*map(_address_of, capsules))
        self._addresses = (ctypes.c_void_p * count)(*(t.data_ptr() for t in tensors))
        self._versions = (ctypes.c_int64 * count)(*(t._version for t in tensors))
        address, version = torch_library.aoti_torch_get_data_ptr, torch_library[VERSION_SYMBOL]
        self._arguments = (
            count, ctypes.addressof(self._handles), ctypes.addressof(self._addresses),
            ctypes.addressof(self._versions),
            ctypes.cast(address, ctypes.c_void_p), ctypes.cast(version, ctypes.c_void_p),
        )  # fmt: skip

    def changed(self) -> bool:
        """Tell whether any tensor lies elsewhere, or was written to, since this was made."""
        return bool(self._native.ttx_tensors_changed(*self._arguments))

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", ()):
            self._torch.aoti_torch_delete_tensor_object(ctypes.c_void_p(handle))


class PlainWatch:
    """The same from Python, with no loop of its own: where there is no C++ runtime, as on a GPU."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = list(tensors)
        self._seen = self._look()

    def changed(self) -> bool:
        """Tell whether any tensor lies elsewhere, or was written to, since this was made."""
        return self._look() != self._seen

    def _look(self) -> tuple[list[int], list[int]]:
        return list(map(_version, self._tensors)), list(map(_address, self._tensors))


def start_native_watch() -> Future[ctypes.CDLL | None]:
    """Begin to build the loops alone in the background, for programs without the C++ runtime; None
    comes of it where there is no compiler, or it fails: then `PlainWatch` does the same."""
    return _start_native_watch(cache_directory())


@functools.cache
def _start_native_watch(folder: Path) -> Future[ctypes.CDLL | None]:
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="turbotx-watch")
    begun = worker.submit(_build_watch)
    worker.shutdown(wait=False)
    return begun


def _build_watch() -> ctypes.CDLL | None:
    try:
        names = ("watch", "dict_watch")
        library, _ = build_library({name: RUNTIME_SOURCES[name].read_text() for name in names})
    except (TurbotxError, OSError):
        return None
    declare_watch(library)
    return library


_version = operator.attrgetter("_version")
_address = torch.Tensor.data_ptr
Watch = TensorWatch | PlainWatch


def make_watch(native: ctypes.CDLL | None, tensors: Sequence[torch.Tensor]) -> Watch:
    """Return a watch over `tensors`, a native one where this PyTorch can be asked natively."""
    library = _torch_library()
    dense = all(isinstance(t, torch.Tensor) for t in tensors)
    if native is None or library is None or not dense or not _works(native, library):
        return PlainWatch(tensors)
    try:
        return TensorWatch(native, library, tensors)
    except RuntimeError:  # a tensor without memory or without a version
        return PlainWatch(tensors)


@functools.cache
def _torch_library() -> ctypes.CDLL | None:
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            library = ctypes.CDLL(str(folder / name))
            wanted = ("aoti_torch_get_data_ptr", "aoti_torch_delete_tensor_object", VERSION_SYMBOL)
            known = all(hasattr(library, symbol) for symbol in wanted)
            return library if known and hasattr(torch._C, "_aoti") else None
    return None


_checked: dict[int, bool] = {}


def _works(native: ctypes.CDLL, library: ctypes.CDLL) -> bool:
    """Try it once on a tensor that is left alone, written to and moved."""
    if native._handle not in _checked:
        answers = []
        for change in (
            lambda t: None,
            lambda t: t.add_(1),
            lambda t: setattr(t, "data", torch.ones(2)),
        ):
            with torch.inference_mode(False), torch.no_grad():  # whatever the caller is in
                tensor = torch.zeros(2)
                watch = TensorWatch(native, library, [tensor])
                change(tensor)
            answers.append(watch.changed())
        _checked[native._handle] = answers == [False, True, True]
    return _checked[native._handle]


def _address_of(capsule: Any) -> int | None:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    found: int | None = get(capsule, None)
    return found
