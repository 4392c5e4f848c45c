"""Native: a program's launches as one table that the C++ runtime walks.

In: an assembly. Out: the library that holds its kernels, and per launch where its arguments and
sizes lie in the program's address table and size table, ready for `ttx_run`::

    table  = [input_ids, weight, ..., arena + 0, arena + 1179648, ...]     addresses
    sizes  = [batch, seq, batch*seq, 1152, ...]                            evaluated per shape
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from turbotx import ir
from turbotx.ir.expr import Expr
from turbotx.kernels.build import build_library, cache_directory
from turbotx.kernels.cpp.attention import AttentionKernel, print_attention
from turbotx.kernels.cpp.printer import print_kernel
from turbotx.kernels.cpp.products import ProductKernel, print_product
from turbotx.kernels.cpp.text import var
from turbotx.kernels.fusion.epilogue import GemmKernel
from turbotx.kernels.fusion.inplace import find_inplace
from turbotx.kernels.fusion.inplace_check import check_inplace
from turbotx.program.assemble import Assembly
from turbotx.runtime.cpu.abi import LaunchRecord, declare_runtime, runtime_units

PRELUDE = '#include "scalar.h"\n#include "scratch.h"\n\n#include <limits>\n\n'
ATTENTION_PRELUDE = '#include <cstdint>\n\n#include "attention.h"\n\n'
PRODUCTS_PRELUDE = '#include <cstdint>\n\n#include "attention_products.h"\n\n'

IN_RUNTIME = {"gemm": "ttx_linear", "store": "ttx_store_rows"}
"""The kinds of launches whose function lies in the runtime itself."""

_started: dict[Path, Future[tuple[ctypes.CDLL, bool]]] = {}
"""By cache directory: the runtime that is being built in the background, until it is asked for."""


def start_runtime() -> None:
    """Begin to build the C++ runtime in the background: capturing a call leaves a core idle.

    What fails there is raised by the `load_runtime` that comes next.
    """
    folder = cache_directory()
    if folder not in _started:
        worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="turbotx-build")
        _started[folder] = worker.submit(_build_runtime)
        worker.shutdown(wait=False)


def load_runtime() -> tuple[ctypes.CDLL, bool]:
    """Return the C++ runtime, shared by every program, and whether it had to be compiled.

    Raises NoCompilerError, or BuildError with the compiler's own words.
    """
    begun = _started.pop(cache_directory(), None)
    return begun.result() if begun is not None else _build_runtime()


def _build_runtime() -> tuple[ctypes.CDLL, bool]:
    library, built = build_library(runtime_units())
    declare_runtime(library)
    return library, built


def print_units(assembly: Assembly) -> tuple[dict[str, str], dict[object, str]]:
    """Return the C++ translation units and the function name of every kernel in them.

    Equal kernels, of different layers or of different names, are one function.
    """
    names: dict[object, str] = {}
    kernels: list[str] = []
    attentions: list[str] = []
    products: list[str] = []
    taken: dict[str, int] = {}
    for launch in assembly.launches:
        target = launch.target
        key = kernel_key(target)
        if key is None or key in names:
            continue
        base = target.name  # type: ignore[attr-defined]
        k = taken.get(base, 0)
        taken[base] = k + 1
        name = f"{base}_{k}"
        names[key] = name
        if isinstance(target, ir.Kernel):
            kernels.append(_print_checked(target, name))
        elif isinstance(target, AttentionKernel):
            attentions.append(print_attention(target, name))
        elif isinstance(target, ProductKernel):
            products.append(print_product(target, name))
    units = {}
    if kernels:
        units["kernels"] = PRELUDE + "\n".join(kernels)
    if attentions:
        units["attention"] = ATTENTION_PRELUDE + "\n".join(attentions)
    if products:
        units["products"] = PRODUCTS_PRELUDE + "\n".join(products)
    return units, names


def _print_checked(kernel: ir.Kernel, name: str) -> str:
    """Return a kernel's source; raise VerifyError where in-place reuse would spoil it."""
    source = print_kernel(kernel, name)
    loops = [var(a.name) for a in kernel.axes if a.extent != 1]
    pairs = [(var(out), var(given)) for out, given in find_inplace(kernel)]
    check_inplace(name, source, loops, pairs)
    return source


def kernel_key(target: object) -> object | None:
    """Return what makes two launches' functions the same; None for those not generated."""
    if isinstance(target, ir.Kernel):
        return target.digest()
    return target if isinstance(target, (AttentionKernel, ProductKernel)) else None


class LaunchTable:
    """The launches that native code runs, between the ones that PyTorch runs.

    slots: place of every tensor (and packed weight) in the address table. values: the expressions
    of the size table. symbols: the function of each native launch. segments: (begin, end) ranges
    of native launches, or the index of one that PyTorch runs.
    """

    def __init__(
        self, assembly: Assembly, native_kinds: frozenset[str],
        runtime: ctypes.CDLL | None, kernels: ctypes.CDLL | None, names: dict[object, str],
    ) -> None:  # fmt: skip
        self.slots: dict[str, int] = {}
        self.values: dict[Expr, int] = {}
        self._arrays: list[object] = []
        for name in assembly.tensors:
            self.slots[name] = len(self.slots)
        self.symbols: dict[int, str] = {}
        self.records = (LaunchRecord * max(1, len(assembly.launches)))()
        self.segments: list[tuple[int, int]] = []
        native_before = False
        for i, launch in enumerate(assembly.launches):
            native = launch.kind in native_kinds
            if native:
                self.symbols[i] = _symbol_of(launch, names)
                self._fill(self.records[i], launch, self.symbols[i], runtime, kernels)
            if native and native_before:
                self.segments[-1] = (self.segments[-1][0], i + 1)
            else:
                self.segments.append((i, i + 1))
            native_before = native

    def value(self, e: Expr) -> int:
        return self.values.setdefault(e, len(self.values))

    def slot(self, name: str) -> int:
        return self.slots.setdefault(name, len(self.slots))

    def _fill(
        self, record: LaunchRecord, launch: ir.Launch, symbol: str,
        runtime: ctypes.CDLL | None, kernels: ctypes.CDLL | None,
    ) -> None:  # fmt: skip
        library = runtime if launch.kind in IN_RUNTIME else kernels
        assert library is not None
        function = getattr(library, symbol)
        record.call = ctypes.cast(function, ctypes.c_void_p).value
        slots, offsets = [], []
        for k, arg in enumerate(launch.args):
            packed = launch.kind == "gemm" and k == 1  # the weight
            if arg is None:
                slots.append(-1)
                offsets.append(-1)
                continue
            slots.append(self.slot(packed_name(launch) if packed else arg.tensor))
            shift = arg.offset * arg.dtype.itemsize
            offsets.append(-1 if packed or shift == 0 else self.value(shift))
        sizes = [self.value(e) for e in launch.sizes]
        record.arg_count, record.size_count = len(slots), len(sizes)
        record.slots, record.offsets, record.sizes = map(self._array, (slots, offsets, sizes))

    def _array(self, numbers: Sequence[int]) -> ctypes.Array[ctypes.c_int32]:
        array = (ctypes.c_int32 * max(1, len(numbers)))(*numbers)
        self._arrays.append(array)
        return array


def _symbol_of(launch: ir.Launch, names: dict[object, str]) -> str:
    """Return the name of a launch's function in the library that holds it."""
    return IN_RUNTIME.get(launch.kind) or names[kernel_key(launch.target)]


def packed_name(launch: ir.Launch) -> str:
    """Return the address table's name of a GEMM's weight in packed form."""
    weight, kind = launch.args[1], launch.target
    assert weight is not None and isinstance(kind, GemmKernel)
    rows, columns = weight.shape
    down, along = weight.strides
    # Several products may read a part each of one weight.
    part = f"{rows}x{columns} by {down},{along} from {weight.offset}"
    return f"{weight.tensor} {part}{' gated' if kind.gated else ''}.packed"
