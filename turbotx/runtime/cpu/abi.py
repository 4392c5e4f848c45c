"""ABI: the interface between Python and the C++ libraries of turbotx itself; mirrors their sources.

In: a loaded library and its name. Out: declared functions and the structs they take; needs neither
a compiler nor symbolic sizes::

    declare("runtime", library)
    library.ttx_run(records, 0, 8, table, sizes, None, 0)

Each library is compiled when the first program needs it: most need no quantised products, whose
kernels take the longest.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

import torch

_HERE = Path(__file__).parent

SOURCES: Mapping[str, Mapping[str, Path]] = {
    "runtime": {
        "runtime": _HERE / "native.cpp",
        "threads": _HERE / "threads.cpp",
        "watch": _HERE.parent / "tensor_watch.cpp",
        "dict_watch": _HERE.parent / "dict_watch.cpp",
    },
    "products": {"products": _HERE / "products.cpp"},
    "quantized": {"quantized": _HERE / "quantized.cpp"},
    "experts": {"experts": _HERE / "experts.cpp"},
}
"""The C++ of each library by translation unit."""


def products_of(dtype: torch.dtype) -> str:
    """Return the library that packs and multiplies weights of a dtype."""
    return "quantized" if dtype in (torch.int8, torch.uint8) else "products"


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
    """Mirrors `PartRecord` in product.h."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("stride_n", ctypes.c_int64),
        ("stride_k", ctypes.c_int64),
    )


def declare(name: str, library: ctypes.CDLL) -> None:
    """Declare the argument types of a library's functions to ctypes."""
    if name == "runtime":
        library.ttx_run.restype = ctypes.c_int64
        library.ttx_run.argtypes = [
            ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int,
        ]  # fmt: skip
        declare_watch(library)
    elif name == "experts":
        library.ttx_pack_experts.restype = ctypes.c_void_p
        library.ttx_pack_experts.argtypes = [
            ctypes.c_int, ctypes.c_void_p, *[ctypes.c_int64] * 6, ctypes.c_int,
        ]  # fmt: skip
        library.ttx_free_experts.restype = None
        library.ttx_free_experts.argtypes = [ctypes.c_void_p]
    elif name in ("products", "quantized"):
        _declare_products(library)


def _declare_products(library: ctypes.CDLL) -> None:
    library.ttx_pack_weight.restype = ctypes.c_void_p
    library.ttx_pack_weight.argtypes = [
        ctypes.c_int, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_int,
    ]  # fmt: skip
    library.ttx_map_weight.restype = ctypes.c_void_p
    library.ttx_map_weight.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int,
    ]  # fmt: skip
    library.ttx_weight_panels.restype = ctypes.c_void_p
    library.ttx_weight_panels.argtypes = [ctypes.c_void_p]
    library.ttx_panel_layout.restype = ctypes.c_int64
    library.ttx_panel_layout.argtypes = [ctypes.c_int]
    library.ttx_free_weight.restype = None
    library.ttx_free_weight.argtypes = [ctypes.c_void_p]
    if hasattr(library, "ttx_set_group_scales"):
        library.ttx_set_group_scales.restype = None
        library.ttx_set_group_scales.argtypes = [
            *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, *[ctypes.c_int] * 2,
        ]  # fmt: skip


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


def units_of(name: str) -> dict[str, str]:
    """Return the C++ source of a library by translation unit."""
    return {unit: path.read_text() for unit, path in SOURCES[name].items()}
