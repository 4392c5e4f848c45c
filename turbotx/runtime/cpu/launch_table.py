"""Launch table: a program's launches as a table that the C++ runtime executes.

In: an assembly. Out: the C++ of its kernels, and per launch the indices of its arguments and sizes
in the program's address and size tables, as plain data::

    table  = [input_ids, weight, ..., arena + 0, arena + 1179648, ...]     addresses
    sizes  = [batch, seq, batch*seq, 1152, ...]                            evaluated per shape
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbotx import ir
from turbotx.ir.expr import ZERO
from turbotx.kernels.build import build_library, cache_directory
from turbotx.kernels.cpp.attention import print_attention
from turbotx.kernels.cpp.printer import print_kernel
from turbotx.kernels.cpp.products import print_product
from turbotx.kernels.cpp.text import var
from turbotx.kernels.fusion.inplace import find_inplace
from turbotx.kernels.fusion.inplace_check import check_inplace
from turbotx.program.assembly import Assembly
from turbotx.program.executable import CpuTables, NativeLaunch, Packing
from turbotx.program.link import LaunchLayout, facts_of, packing_of
from turbotx.runtime.cpu.abi import declare, units_of

PRELUDE = '#include "scalar.h"\n#include "scratch.h"\n#include "threads.h"\n\n#include <limits>\n\n'

Generated = (ir.KernelLaunch, ir.AttentionLaunch, ir.ProductLaunch)


@dataclass(frozen=True)
class CppUnit:
    """A translation unit of generated functions.

    prelude: its first lines. print: returns the source of a kernel's function, given its name.
    """

    name: str
    prelude: str
    print: Callable[[Any, str], str]


UNITS: dict[type[ir.Launch], CppUnit] = {
    ir.KernelLaunch: CppUnit("kernels", PRELUDE, print_kernel),
    ir.AttentionLaunch: CppUnit(
        "attention", '#include "attention_cached.h"\n#include "attention_packed.h"\n\n',
        print_attention,
    ),
    ir.ProductLaunch: CppUnit(
        "products", '#include <cstdint>\n\n#include "attention_products.h"\n\n', print_product
    ),
}  # fmt: skip
"""The unit of the functions of each generated type of launch."""

PackedGemm = (ir.GemmLaunch, ir.GroupedGemmLaunch)
"""The launches with packed weights."""

OWN_FUNCTIONS: dict[type[ir.Launch], tuple[str, str]] = {
    ir.GemmLaunch: ("products", "ttx_linear"),
    ir.StoreLaunch: ("runtime", "ttx_store_rows"),
    ir.GroupedGemmLaunch: ("experts", "ttx_grouped_linear"),
    ir.RouteLaunch: ("experts", "ttx_route"),
}
"""The launches whose function is in a library of turbotx itself: which library, and its name."""

_started: dict[tuple[Path, str], Future[tuple[ctypes.CDLL, bool]]] = {}
"""By cache directory and name: libraries being built in the background, until they are used."""
os.register_at_fork(after_in_child=_started.clear)  # a fork has no building thread


def start_libraries(names: Iterable[str]) -> None:
    """Start building libraries of turbotx itself in the background: tracing leaves a core idle.

    An error there is raised by the next `load_library`.
    """
    for name in names:
        key = cache_directory(), name
        if key not in _started:
            worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="turbotx-build")
            _started[key] = worker.submit(_build, name)
            worker.shutdown(wait=False)


def load_library(name: str) -> tuple[ctypes.CDLL, bool]:
    """Return a library of turbotx itself, shared by all programs, and whether it had to be
    compiled.

    Raises NoCompilerError, or BuildError with the compiler's output.
    """
    begun = _started.pop((cache_directory(), name), None)
    return begun.result() if begun is not None else _build(name)


def _build(name: str) -> tuple[ctypes.CDLL, bool]:
    library, built = build_library(units_of(name))
    declare(name, library)
    return library, built


def own_function(launch: ir.Launch) -> tuple[str, str] | None:
    """Return a launch's library and function in it; None where its kernel is generated."""
    if isinstance(launch, ir.GemmLaunch) and launch.int8 is not None:
        return "quantized", "ttx_linear_quantized"
    return OWN_FUNCTIONS.get(type(launch))


def print_units(assembly: Assembly) -> tuple[dict[str, str], dict[object, str]]:
    """Return the C++ translation units, and the function name of every kernel in them.

    Kernels with equal structure share one function across layers and names.
    """
    names: dict[object, str] = {}
    functions: dict[type[ir.Launch], list[str]] = {kind: [] for kind in UNITS}
    taken = Counter[str]()
    for launch in assembly.launches:
        key = kernel_key(launch)
        if key is None or key in names:
            continue
        assert isinstance(launch, Generated)
        base = launch.kernel.name
        name = names[key] = f"{base}_{taken[base]}"
        taken[base] += 1
        source = UNITS[type(launch)].print(launch.kernel, name)
        if isinstance(launch, ir.KernelLaunch):
            _check_reuse(launch.kernel, name, source)
        functions[type(launch)].append(source)
    units = {
        unit.name: unit.prelude + "\n".join(functions[kind])
        for kind, unit in UNITS.items()
        if functions[kind]
    }
    return units, names


def _check_reuse(kernel: ir.Kernel, name: str, source: str) -> None:
    """Raise VerifyError if in-place reuse would give wrong results in a kernel's source."""
    loops = [var(a.name) for a in kernel.axes if a.extent != 1]
    pairs = [(var(out), var(given)) for out, given in find_inplace(kernel)]
    check_inplace(name, source, loops, pairs)


def kernel_key(launch: ir.Launch) -> object | None:
    """Return the key of a launch's generated function; None for launches without one."""
    if isinstance(launch, ir.KernelLaunch):
        return launch.kernel.digest()
    return launch.kernel if isinstance(launch, Generated) else None


def lay_out_launches(
    assembly: Assembly, native_types: frozenset[type[ir.Launch]], names: dict[object, str]
) -> LaunchLayout:
    """Return the argument indices of every native launch.

    native_types: the types of launches that run natively.
    names: the function of each generated kernel.
    """
    table = LaunchLayout({name: k for k, name in enumerate(assembly.tensors)})
    packings: dict[int, Packing] = {}
    segments: list[tuple[int, int]] = []
    read = set(assembly.returned)
    for i, launch in enumerate(assembly.launches):
        native = type(launch) in native_types
        operands = launch.operands
        if native:
            table.launches[i] = _link(launch, table, names)
            if isinstance(launch, PackedGemm):
                packing = packing_of(launch, table.slots[_packed_name(launch)], assembly.hoisted)
                packings[packing.slot] = packing
                operands = tuple(a for a in operands if not _is_packed(launch, a))
        read.update(a.tensor for a in operands if a is not None)
        if native and i - 1 in table.launches:
            segments[-1] = (segments[-1][0], i + 1)
        else:
            segments.append((i, i + 1))
    table.cpu, table.read = CpuTables(tuple(segments), tuple(packings.values())), read
    return table


def _link(launch: ir.Launch, table: LaunchLayout, names: dict[object, str]) -> NativeLaunch:
    slots, offsets = [], []
    for arg in launch.operands:
        shift = ZERO if arg is None else arg.offset * arg.dtype.itemsize
        if isinstance(launch, PackedGemm) and arg is launch.weight:
            slot = table.slots.setdefault(_packed_name(launch), len(table.slots))
            shift = ZERO
        elif isinstance(launch, PackedGemm) and _is_packed(launch, arg):
            slot, shift = -1, ZERO
        else:
            slot = -1 if arg is None else table.slots[arg.tensor]
        slots.append(slot)
        offsets.append(-1 if shift == 0 else table.value(shift))
    own = own_function(launch)
    library, symbol = ("kernels", names[kernel_key(launch)]) if own is None else own
    return NativeLaunch(
        **facts_of(launch),
        library=library,
        symbol=symbol,
        slots=tuple(slots),
        offsets=tuple(offsets),
        sizes=tuple(table.value(e) for e in launch.sizes),
    )


def _is_packed(launch: ir.GemmLaunch | ir.GroupedGemmLaunch, operand: ir.Operand | None) -> bool:
    """Return whether it is in the packed weight: the weight, and the scales of groups."""
    int8 = launch.int8 if isinstance(launch, ir.GemmLaunch) else None
    of_groups = int8 is not None and int8.group > 0 and operand is int8.weight_scale
    return operand is launch.weight or of_groups


def _packed_name(launch: ir.GemmLaunch | ir.GroupedGemmLaunch) -> str:
    """Return the name of a GEMM's packed weight in the address table."""
    weight = launch.weight
    sizes, steps = "x".join(map(str, weight.shape)), ",".join(map(str, weight.strides))
    # Several products may each read a part of one weight.
    part = f"{sizes} by {steps} from {weight.offset}"
    return f"{weight.tensor} {part}{' gated' if launch.gemm.gated else ''}.packed"
