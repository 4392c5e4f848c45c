"""ABI: the interface between Python and the C++ runtime; mirrors `native.cpp`.

In: the loaded runtime library. Out: declared functions and the structs they take; needs neither a
compiler nor symbolic sizes::

    declare_runtime(library)
    library.ttx_run(records, 0, 8, table, sizes, None)
"""

from __future__ import annotations

import ctypes
from pathlib import Path

RUNTIME_SOURCES = {
    "runtime": Path(__file__).with_name("native.cpp"),
    "threads": Path(__file__).with_name("threads.cpp"),
    "watch": Path(__file__).parents[1] / "tensor_watch.cpp",
    "dict_watch": Path(__file__).parents[1] / "dict_watch.cpp",
}


class LaunchRecord(ctypes.Structure):
    """Mirrors `Launch` in native.cpp."""

    _fields_ = (
        ("call", ctypes.c_void_p),
        ("arg_count", ctypes.c_int32),
        ("size_count", ctypes.c_int32),
        ("slots", ctypes.POINTER(ctypes.c_int32)),
        ("offsets", ctypes.POINTER(ctypes.c_int32)),
        ("sizes", ctypes.POINTER(ctypes.c_int32)),
    )


class PartRecord(ctypes.Structure):
    """Mirrors `Part` in native.cpp."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("stride_n", ctypes.c_int64),
        ("stride_k", ctypes.c_int64),
    )


def declare_runtime(library: ctypes.CDLL) -> None:
    """Declare the argument types of the runtime's functions to ctypes."""
    library.ttx_pack_weight.restype = ctypes.c_void_p
    library.ttx_pack_weight.argtypes = [
        ctypes.c_int, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_int,
    ]  # fmt: skip
    library.ttx_pack_experts.restype = ctypes.c_void_p
    library.ttx_pack_experts.argtypes = [
        ctypes.c_int, ctypes.c_void_p, *[ctypes.c_int64] * 6, ctypes.c_int,
    ]  # fmt: skip
    library.ttx_map_weight.restype = ctypes.c_void_p
    library.ttx_map_weight.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int,
    ]  # fmt: skip
    library.ttx_set_group_scales.restype = None
    library.ttx_set_group_scales.argtypes = [
        *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, *[ctypes.c_int] * 2,
    ]  # fmt: skip
    library.ttx_weight_panels.restype = ctypes.c_void_p
    library.ttx_weight_panels.argtypes = [ctypes.c_void_p]
    library.ttx_panel_layout.restype = ctypes.c_int64
    library.ttx_panel_layout.argtypes = [ctypes.c_int]
    library.ttx_free_weight.argtypes = [ctypes.c_void_p]
    library.ttx_free_weight.restype = None
    library.ttx_run.restype = ctypes.c_int64
    library.ttx_run.argtypes = [
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip
    declare_watch(library)


def declare_watch(library: ctypes.CDLL) -> None:
    """Declare the functions of `tensor_watch.cpp` and `dict_watch.cpp` to ctypes."""
    library.ttx_watch_tensors.restype = ctypes.c_void_p
    library.ttx_watch_tensors.argtypes = [ctypes.c_int64, *[ctypes.c_void_p] * 3]
    library.ttx_tensors_changed.restype = ctypes.c_int
    library.ttx_tensors_changed.argtypes = [ctypes.c_void_p]
    library.ttx_free_watch.restype = None
    library.ttx_free_watch.argtypes = [ctypes.c_void_p]
    library.ttx_dict_counter.restype = ctypes.c_void_p
    library.ttx_dict_counter.argtypes = [ctypes.c_void_p]


def runtime_units() -> dict[str, str]:
    """Return the C++ source of the runtime by translation unit."""
    return {name: path.read_text() for name, path in RUNTIME_SOURCES.items()}
