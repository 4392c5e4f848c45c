"""Tensor watch: detects whether any of many tensors was written or moved since the last check.

In: tensors, and from which of them something was derived. Out: one native call that compares all
addresses, versions, dtypes and layouts, and samples elements of the latter, since writes through
`.data` do not change the version. For a BERT-base's 200 parameters it takes 7 us::

    watch = make_watch(native, parameters, derived_from=[True, False, ...])
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
from turbotx.runtime.cpu.abi import declare_watch, units_of

VERSION_SYMBOL = "_ZNK2at10TensorBase8_versionEv"
"""Mangled name (GCC and Clang) of at::TensorBase::_version(), which PyTorch's C API lacks."""

FUNCTIONS = (
    VERSION_SYMBOL, "aoti_torch_get_data_ptr", "aoti_torch_get_dtype", "aoti_torch_get_dim",
    "aoti_torch_get_sizes", "aoti_torch_get_strides",
)  # fmt: skip
"""In the order of `Functions` in tensor_watch.cpp."""

KEPT = 32
"""Number of elements that `PlainWatch` samples per tensor from which something was derived."""


class TensorWatch:
    """The state of tensors when this was made, compared natively."""

    def __init__(
        self, native: ctypes.CDLL, torch_library: ctypes.CDLL,
        tensors: Sequence[torch.Tensor], sampled: Sequence[bool],
    ) -> None:  # fmt: skip
        self._native, self._torch = native, torch_library
        count = len(tensors)
        capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
        self._handles = (ctypes.c_void_p * count)(*map(_address_of, capsules))
        for tensor in tensors:
            _version(tensor)  # raises RuntimeError if it has none
        found = [ctypes.cast(torch_library[name], ctypes.c_void_p) for name in FUNCTIONS]
        functions = (ctypes.c_void_p * len(found))(*(f.value for f in found))
        nbytes = (
            x.element_size() if looked and _has_elements_here(x) else 0
            for x, looked in zip(tensors, sampled, strict=True)
        )
        self._watch = ctypes.c_void_p(
            native.ttx_watch_tensors(
                count, self._handles, (ctypes.c_int64 * count)(*nbytes), functions
            )
        )

    def changed(self) -> bool:
        """Return whether any tensor was moved, got another layout, or was written to."""
        return bool(self._native.ttx_tensors_changed(self._watch))

    def __del__(self) -> None:
        if getattr(self, "_watch", None) is not None:
            self._native.ttx_free_watch(self._watch)
        for handle in getattr(self, "_handles", ()):
            self._torch.aoti_torch_delete_tensor_object(ctypes.c_void_p(handle))


class PlainWatch:
    """The same in Python, without Python-level loops, for programs without the C++ runtime."""

    def __init__(self, tensors: Sequence[torch.Tensor], sampled: Sequence[bool] = ()) -> None:
        self._tensors = list(tensors)
        looked = [x for x, s in zip(tensors, sampled, strict=False) if s and _has_elements_here(x)]
        self._parts = [_sample(x.detach()) for x in looked]
        self._seen = self._look()
        self._bits = self._read()

    def changed(self) -> bool:
        """Return whether any tensor was moved, got another layout, or was written to."""
        return self._look() != self._seen or self._read() != self._bits

    def _look(self) -> list[Any]:
        looks = (_version, _address, _dtype, _shape, _strides)
        return [list(map(look, self._tensors)) for look in looks]

    def _read(self) -> bytes:
        # Compare bytes, so that NaN equals itself.
        dense = (part.contiguous().view(torch.uint8) for part in self._parts)
        return b"".join(part.numpy().tobytes() for part in dense)


def _has_elements_here(tensor: torch.Tensor) -> bool:
    """Return whether elements can be read without a device synchronization; others are not
    sampled."""
    here = tensor.device.type == "cpu" and tensor.layout is torch.strided
    return here and tensor.numel() > 0 and tensor.data_ptr() != 0


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of at most `KEPT` elements of a tensor."""
    count, stride = tensor.numel(), 1
    if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        longest = max(range(tensor.dim()), key=lambda d: tensor.shape[d])
        count, stride = tensor.shape[longest], tensor.stride(longest)
    step = max(1, (count - 1) // (KEPT - 1))
    places = (min(KEPT, count),), (step * stride,)
    return tensor.as_strided(*places, tensor.storage_offset())


def start_native_watch() -> Future[ctypes.CDLL | None]:
    """Start building the native watch in the background, for programs without the C++ runtime. The
    result is None if there is no compiler or the build fails; `PlainWatch` is used then."""
    return _start_native_watch(cache_directory())


@functools.cache
def _start_native_watch(folder: Path) -> Future[ctypes.CDLL | None]:
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="turbotx-watch")
    begun = worker.submit(_build_watch)
    worker.shutdown(wait=False)
    return begun


def _build_watch() -> ctypes.CDLL | None:
    try:
        units = units_of("runtime")
        library, _ = build_library({name: units[name] for name in ("watch", "dict_watch")})
    except (TurbotxError, OSError):
        return None
    declare_watch(library)
    return library


_version = operator.attrgetter("_version")
_dtype, _shape = operator.attrgetter("dtype"), operator.attrgetter("shape")
_address, _strides = torch.Tensor.data_ptr, torch.Tensor.stride
Watch = TensorWatch | PlainWatch


def make_watch(
    native: ctypes.CDLL | None, tensors: Sequence[torch.Tensor],
    derived_from: Sequence[bool] | None = None,
) -> Watch:  # fmt: skip
    """Return a watch over `tensors`, a native one if this version of PyTorch supports it.

    derived_from: for each tensor, whether something was derived from its values, so that it is
    sampled. Raises RuntimeError for a tensor without a version.
    """
    library = _torch_library()
    sampled = derived_from or [False] * len(tensors)
    dense = all(isinstance(t, torch.Tensor) for t in tensors)
    if native is None or library is None or not dense or not _works(native, library):
        return PlainWatch(tensors, sampled)
    try:
        return TensorWatch(native, library, tensors, sampled)
    except RuntimeError:  # a tensor without storage or version
        return PlainWatch(tensors, sampled)


@functools.cache
def _torch_library() -> ctypes.CDLL | None:
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            library = ctypes.CDLL(str(folder / name))
            wanted = (*FUNCTIONS, "aoti_torch_delete_tensor_object")
            known = all(hasattr(library, symbol) for symbol in wanted)
            return library if known and hasattr(torch._C, "_aoti") else None
    return None


_checked: dict[int, bool] = {}


def _works(native: ctypes.CDLL, library: ctypes.CDLL) -> bool:
    """Test it on a tensor that is unchanged, written, moved, transposed, and written through
    `.data`."""
    if native._handle not in _checked:
        answers = []
        for change in (
            lambda t: None,
            lambda t: t.add_(1),
            lambda t: setattr(t, "data", torch.ones(2, 2)),
            lambda t: setattr(t, "data", t.data.t()),
            lambda t: t.data.add_(1),
        ):
            with torch.inference_mode(False), torch.no_grad():  # independent of the caller's mode
                tensor = torch.zeros(2, 2)
                watch = TensorWatch(native, library, [tensor], [True])
                change(tensor)
            answers.append(watch.changed())
        _checked[native._handle] = answers == [False, True, True, True, True]
    return _checked[native._handle]


def _address_of(capsule: Any) -> int | None:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    found: int | None = get(capsule, None)
    return found
