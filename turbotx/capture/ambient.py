"""Ambient state: PyTorch's global settings that affect what a call computes.

In: nothing; the settings are read from PyTorch, for the current thread. Out: a tuple that is part
of a call's key (read in under a microsecond), and contexts that turn some settings off::

    read_ambient()  ->  ((("cpu", torch.bfloat16),), torch.float32, (), False, ...)
"""

from __future__ import annotations

import os
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd import grad_mode

from turbotx.capture.inner_modes import InnerModes
from turbotx.errors import CaptureError

Ambient = tuple[Any, ...]
"""The type of `read_ambient`'s result; the values are in the order of NAMES."""

NAMES = (
    "torch.autocast", "torch.get_default_dtype", "torch.get_default_device and the like",
    "torch.are_deterministic_algorithms_enabled",
    "torch.is_deterministic_algorithms_warn_only_enabled",
    "torch.get_float32_matmul_precision", "torch.backends.cuda.flash_sdp_enabled",
    "torch.backends.cuda.math_sdp_enabled", "torch.backends.cuda.mem_efficient_sdp_enabled",
    "torch.backends.cuda.cudnn_sdp_enabled", "torch.is_grad_enabled",
    "torch.is_inference_mode_enabled", "torch.get_num_threads",
    "torch.backends.mha.get_fastpath_enabled",
)  # fmt: skip

DECISIVE = 3
"""The first DECISIVE settings affect every trace; the others only where Python code reads them
(`watch_reads`)."""

DEVICES = ("cpu", "cuda")
"""The device types that turbotx runs on; autocast on other devices is ignored."""

_C: Any = torch._C
_any_autocast: Callable[[], bool] = _C._is_any_autocast_enabled
_count_modes: Callable[[], int] = _C._len_torch_function_stack
_default_dtype = torch.get_default_dtype
_GETTERS: tuple[Callable[[], Any], ...] = (
    _C._get_deterministic_algorithms, _C._get_deterministic_algorithms_warn_only,
    _C._get_float32_matmul_precision, _C._get_flash_sdp_enabled, _C._get_math_sdp_enabled,
    _C._get_mem_efficient_sdp_enabled, _C._get_cudnn_sdp_enabled, torch.is_grad_enabled,
    torch.is_inference_mode_enabled, torch.get_num_threads,
    torch.backends.mha.get_fastpath_enabled,
)  # fmt: skip


def read_ambient() -> Ambient:
    """Return all settings of the current thread: hashable, and equal if nothing has changed."""
    return (*read_decisive(), *(get() for get in _GETTERS))


def read_decisive() -> Ambient:
    """Return only the settings that affect every trace; takes a third of a microsecond."""
    return (
        _autocast() if _any_autocast() else (),
        _default_dtype(),
        _modes() if _count_modes() else (),
    )


def read_asked(places: Sequence[int]) -> Ambient:
    """Return the settings at the given indices of NAMES, each at least DECISIVE."""
    return tuple(_GETTERS[k - DECISIVE]() for k in places)


def _autocast() -> tuple[tuple[str, torch.dtype], ...]:
    """Return the devices that autocast is on for, each with its dtype."""
    on = [name for name in DEVICES if torch.is_autocast_enabled(name)]
    return tuple((name, torch.get_autocast_dtype(name)) for name in on)


def _modes() -> tuple[Any, ...]:
    """Return the active TorchFunctionModes: those of `with torch.device(...)` as device names,
    others as they are."""
    modes = [_C._get_function_stack_at(k) for k in range(_count_modes())]
    return tuple(str(d) if (d := getattr(m, "device", None)) is not None else m for m in modes)


def unknown_modes(ambient: Ambient) -> list[str]:
    """Return the type names of the active TorchFunctionModes, except those that only set a
    device."""
    return [type(mode).__name__ for mode in ambient[2] if not isinstance(mode, str)]


def differences(ambient: Ambient, wanted: Ambient, asked: Sequence[int]) -> list[str]:
    """Describe how two ambient states differ, among the decisive settings and those in `asked`."""
    return [
        f"{NAMES[k]}: {_show(k, ambient[k])} now, {_show(k, wanted[k])} then"
        for k in (*range(DECISIVE), *asked)
        if ambient[k] != wanted[k]
    ]


def _show(place: int, value: Any) -> str:
    if place == 0:
        return " and ".join(f"{dtype} on {device}" for device, dtype in value) or "off"
    if place == 2:
        return ", ".join(m if isinstance(m, str) else type(m).__name__ for m in value) or "none"
    return str(value)


def without_autocast() -> AbstractContextManager[object]:
    """Context manager: turn autocast off in this thread."""
    return _Off() if _any_autocast() else _NOTHING


_NOTHING = nullcontext()


class _Off:
    def __enter__(self) -> None:
        self.on = [name for name in DEVICES if torch.is_autocast_enabled(name)]
        for name in self.on:
            torch.set_autocast_enabled(name, False)

    def __exit__(self, *error: object) -> None:
        for name in self.on:
            torch.set_autocast_enabled(name, True)


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Context manager: turn off autocast's weight cache in this thread.

    A trace would leave fake tensors in the cache, and would miss the casts that are already cached.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


# --- settings read by Python code ---

_WATCHED = {name: k for k, name in enumerate(NAMES) if k >= DECISIVE} | {
    "torch.get_deterministic_debug_mode": NAMES.index("torch.are_deterministic_algorithms_enabled")
}
"""The functions by which Python code reads settings, with the index of each setting in NAMES."""
_INSIDE = str(Path(torch.__file__).parent) + os.sep


@contextmanager
def watch_reads(ambient: Ambient) -> Iterator[set[int]]:
    """Context manager: collect the indices in NAMES of the settings that this thread's code reads.

    A trace runs without gradients, so code outside PyTorch that asks for the gradient mode gets the
    caller's mode, or what it has set itself; PyTorch's own code asks all the time, and its results
    do not depend on it. Not reentrant.
    """
    asked: set[int] = set()
    thread, modes = threading.get_ident(), InnerModes()
    with ExitStack() as stack:
        stack.enter_context(modes.followed())
        for path, place in _WATCHED.items():
            home, _, name = path.rpartition(".")
            owner = pkgutil.resolve_name(home)
            original = getattr(owner, name, None)
            if original is not None:
                watched = _watched(original, place, ambient, asked, modes)
                stack.enter_context(patch.object(owner, name, watched))
        setter = "_set_default_dtype"  # private: every public setter calls it
        if hasattr(_C, setter):
            refusing = _refusing(getattr(_C, setter), thread)
            stack.enter_context(patch.object(_C, setter, refusing))
        yield asked


def _refusing(original: Callable[[Any], None], thread: int) -> Callable[[Any], None]:
    """Return a setter that raises CaptureError when the model changes the default dtype: tensors
    made afterwards would have the dtype set during the trace, not the one at call time."""

    def set_default_dtype(dtype: torch.dtype) -> None:
        if threading.get_ident() == thread and dtype != _default_dtype():
            raise CaptureError(
                f"its code sets torch's default dtype from {_default_dtype()} to {dtype}, which "
                "a program cannot do: set it before the call, or pass dtype= where tensors are "
                "created"
            )
        original(dtype)

    return set_default_dtype


def _watched(
    original: Callable[[], Any], place: int, ambient: Ambient, asked: set[int], modes: InnerModes
) -> Callable[[], Any]:
    mode = {"torch.is_grad_enabled": "grad", "torch.is_inference_mode_enabled": "inference"}.get(
        NAMES[place]
    )

    def ask() -> Any:
        if threading.get_ident() != modes.thread:
            return original()
        asker = sys._getframe(1).f_code.co_filename
        if mode == "grad" and asker == grad_mode.__file__ and modes.is_active():
            return modes.look()
        if mode is not None and asker.startswith(_INSIDE):
            return original()
        if mode is not None and (own := getattr(modes, mode)) is not None:
            return own
        asked.add(place)
        return original() if mode is None else ambient[place]

    return ask
