"""Link: converts an assembly to an `Executable` of slots, size texts and plan tables.

In: an assembly, and the layout of a runtime for its device: slots, sizes, launches. Out: plain
data, including what the planner precomputes about memory::

    link(assembly, ("batch", "seq"), "symbolic", layout)  ->  Executable(...)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx

from turbotx import ir
from turbotx.capture.result_layouts import Alias
from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import Expr, product, sizes_of, to_python
from turbotx.ir.quantized_ops import QUANTIZES, SCALES
from turbotx.ir.sizes import Evaluate
from turbotx.ir.strides import contiguous_strides, layout_of
from turbotx.memory.liveness import LaunchUse, Liveness, analyze
from turbotx.memory.planner import Workload, find_orientations
from turbotx.program.assembly import Assembly, over
from turbotx.program.executable import (
    CalledLaunch,
    CpuTables,
    Executable,
    GpuTables,
    InputTensor,
    LinkedLaunch,
    MemoryTables,
    OutputTensor,
    Packing,
    PytorchCall,
    ReturnedView,
    TokenRange,
    WeightWindow,
    WholeTensor,
    Window,
)
from turbotx.program.meaning import meaning_of

CAT = torch.ops.aten.cat.default


@dataclass
class LaunchLayout:
    """How a runtime lays out a program for its device.

    slots: index of every tensor in the table of addresses.
    values: index of every expression in the table of sizes.
    launches: those that the device runs, by index.
    read: the tensors that are read unpacked; None if all may be.
    """

    slots: dict[str, int]
    values: dict[Expr, int] = field(default_factory=dict)
    launches: dict[int, LinkedLaunch] = field(default_factory=dict)
    cpu: CpuTables | None = None
    gpu: GpuTables | None = None
    token_range: TokenRange | None = None
    read: Collection[str] | None = None

    def value(self, e: Expr) -> int:
        """Return the index of an expression in the table of sizes, added if new."""
        return self.values.setdefault(e, len(self.values))

    def shifts(self, operands: Mapping[str, ir.Operand | None]) -> list[tuple[str, int]]:
        """Return (name, index of the byte offset in the size table) of each operand with an
        offset."""
        return [
            (name, self.value(a.offset * a.dtype.itemsize))
            for name, a in operands.items()
            if a is not None and a.offset != 0
        ]

    def expression(self, place: int) -> Expr:
        """Return the expression at an index of the table of sizes."""
        return list(self.values)[place]


def link(assembly: Assembly, dims: Sequence[str], planner: str, layout: LaunchLayout) -> Executable:
    """Return the executable of an assembly; launches without a layout run in PyTorch."""
    tensors, names = assembly.tensors.values(), tuple(dims)
    requirements = dict.fromkeys(assembly.requirements)
    held = [t.name for t in tensors if t.kind in ("parameter", "hoisted")]
    return Executable(
        dims=names,
        values=sizes_of(layout.values),
        requirements=sizes_of(e for e, _ in requirements),
        requirement_texts=tuple(text for _, text in requirements),
        slots=dict(layout.slots),
        inputs=tuple(
            InputTensor(
                t.name, t.dtype, sizes_of(t.shape), assembly.orders.get(t.name),
                t.name in assembly.raw, assembly.raw.get(t.name, False),
            )
            for t in tensors if t.kind == "input"
        ),
        outputs=tuple(
            OutputTensor(t.name, t.dtype, sizes_of(t.shape)) for t in tensors if t.kind == "output"
        ),
        weights=tuple(n for n in held if layout.read is None or n in layout.read),
        launches=tuple(
            layout.launches.get(i) or CalledLaunch(**facts_of(x), call=_plain_call(meaning_of(x)))
            for i, x in enumerate(assembly.launches)
        ),
        leaves=tuple(_leaf(leaf, assembly) for leaf in assembly.outputs),
        memory=_plan_memory(assembly, names, planner),
        cpu=layout.cpu, gpu=layout.gpu, token_range=layout.token_range,
    )  # fmt: skip


def facts_of(launch: ir.Launch) -> dict[str, Any]:
    """Return the fields that every linked launch takes from a launch."""
    checks: tuple[tuple[str, str], ...] = ()
    if isinstance(launch, ir.KernelLaunch):
        checks = tuple(_find_checks(launch))
    if isinstance(launch, ir.GroupedGemmLaunch):  # offsets must not decrease
        checks = ((launch.ends.tensor, f"{launch.rows} + 1, none below the one before"),)
    return {
        "name": launch.name, "source": launch.source, "writes": launch.writes, "checks": checks
    }  # fmt: skip


def _find_checks(launch: ir.KernelLaunch) -> Iterable[tuple[str, str]]:
    """Yield (tensor, limit) for each index check of a kernel: values must lie in [0, limit)."""
    kernel = launch.kernel
    made = {r: s for s in kernel.body for r in ir.results_of(s)}
    for check in kernel.body:
        if not isinstance(check, ir.Check):
            continue
        name, source = check.value, made[check.value]
        if isinstance(source, ir.Load):
            position = [p.name for p in kernel.params].index(source.access.param)
            name = launch.args[position].tensor
        yield name, str(check.limit)


def plain_window(operand: ir.Operand) -> Window:
    """Return an operand as plain data."""
    shape, strides, offset = map(sizes_of, (operand.shape, operand.strides, (operand.offset,)))
    return Window(operand.tensor, operand.dtype, shape, strides, offset)


def _no_zero_strides(operand: ir.Operand) -> ir.Operand:
    """Give dims of extent 1 contiguous strides: oneDNN divides by the strides of a result."""
    shape = operand.shape
    strides = (product(shape[d:]) if n == 1 else operand.strides[d] for d, n in enumerate(shape))
    return replace(operand, strides=tuple(strides))


def weight_window(weight: ir.Operand) -> WeightWindow:
    """Return a part of a weight, whose sizes are constant, as plain data."""
    shape, strides = (tuple(map(int, x)) for x in (weight.shape, weight.strides))
    return WeightWindow(weight.tensor, shape, strides, int(weight.offset))


def weight_parts(weight: ir.Operand, hoisted: Mapping[str, fx.Node]) -> tuple[WeightWindow, ...]:
    """Return the windows whose rows make up a weight: those it concatenates, so that the
    concatenation need not be computed, or the weight itself."""
    whole, node = weight_window(weight), hoisted.get(weight.tensor)
    if node is None or not _joins_rows(node) or not _is_whole(weight):
        return (whole,)
    found = _row_parts(node)
    return found if sum(part.shape[0] for part in found) == whole.shape[0] else (whole,)


def packing_of(
    launch: ir.GemmLaunch | ir.GroupedGemmLaunch, slot: int, hoisted: Mapping[str, fx.Node]
) -> Packing:
    """Return what a launch's weight is made of. slot: where it is packed to."""
    weight, gated = launch.weight, launch.gemm.gated
    if isinstance(launch, ir.GroupedGemmLaunch):
        return Packing(slot, (weight_window(weight),), gated)
    parts = weight_parts(weight, hoisted)
    if launch.int8 is None:
        return Packing(slot, parts, gated)
    sources, scale = _quantized_from(weight, hoisted)
    group = launch.int8.group
    if not group:
        return Packing(slot, parts, gated, sources, scale)
    scale, depth = launch.int8.weight_scale.tensor, int(launch.x.shape[-1])
    return Packing(slot, parts, gated, sources, scale, group, depth)


def find_integers(assembly: Assembly) -> tuple[tuple[Packing, ...], frozenset[str]]:
    """Return what weights of integers are made of, where no launch packs them, and the parameters
    and constants that nothing else reads."""
    found: dict[str, Packing] = {}
    for launch in assembly.launches:
        if isinstance(launch, ir.GemmLaunch) and launch.int8 is not None:
            packing = packing_of(launch, -1, assembly.hoisted)
            if packing.sources:
                found[launch.weight.tensor] = packing
    alone = [n for name in found for n in _read_by_none_else(assembly.hoisted[name])]
    return tuple(found.values()), frozenset(alone)


def _read_by_none_else(integers: fx.Node) -> list[str]:
    """Return what integers are made of, and nothing besides them and their scales."""
    whole = g.operand(integers, 0)
    if not all(g.is_call(u, *QUANTIZES, *SCALES) for u in whole.users):
        return []
    parts = whole.all_input_nodes if _joins_rows(whole) else []
    return [whole.name, *(n.name for n in parts if [*n.users] == [whole])]


def _quantized_from(
    weight: ir.Operand, hoisted: Mapping[str, fx.Node]
) -> tuple[tuple[WeightWindow, ...], str]:
    """Return the windows of parameters whose rows a weight of integers quantises, and the name of
    their scales; nothing where it is made otherwise."""
    node = hoisted.get(weight.tensor)
    if node is None or not g.is_call(node, *QUANTIZES) or not _is_whole(weight):
        return (), ""
    found = _row_parts(g.operand(node, 0))
    return found, g.operand(node, 1).name if found else ""


def _joins_rows(node: fx.Node) -> bool:
    return g.is_call(node, CAT) and not node.kwargs and node.args[1:] in ((), (0,))


def _is_whole(weight: ir.Operand) -> bool:
    return weight.offset == 0 and weight.strides == contiguous_strides(weight.shape)


def _row_parts(node: fx.Node) -> tuple[WeightWindow, ...]:
    """Return the windows that a node views or concatenates by rows; () if one has no strides."""
    sources: Any = node.args[0] if _joins_rows(node) else [node]
    found: list[WeightWindow] = []
    for source in sources:
        layout = layout_of(source)
        if layout is None:
            return ()
        found.append(weight_window(over(layout, g.dtype(source))))
    return tuple(found)


def _plain_call(call: ir.AtenCall) -> PytorchCall:
    writes = tuple(None if w is None else plain_window(_no_zero_strides(w)) for w in call.writes)
    args, kwargs = _plain(call.args), _plain(call.kwargs)
    return PytorchCall(call.target, args, kwargs, writes, call.has_out)


def _plain(value: Any) -> Any:
    """Return call arguments with operands as windows and expressions as texts."""
    if isinstance(value, ir.Operand):
        return plain_window(value)
    if isinstance(value, sympy.Basic):
        return sizes_of([value])
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _leaf(leaf: Any, assembly: Assembly) -> Any:
    if isinstance(leaf, ir.Operand):
        dense = leaf.offset == 0 and leaf.strides == contiguous_strides(leaf.shape)
        if dense and leaf.shape == assembly.tensors[leaf.tensor].shape:
            return WholeTensor(leaf.tensor, leaf.dtype)
    if isinstance(leaf, Alias):
        return ReturnedView(
            leaf.root, tuple((op, _plain(args), _plain(named)) for op, args, named in leaf.steps)
        )
    return _plain(leaf) if isinstance(leaf, (ir.Operand, sympy.Basic)) else leaf


# --- memory ---


def _plan_memory(assembly: Assembly, dims: tuple[str, ...], planner: str) -> MemoryTables:
    """Return the lifetimes, the size class of every root, and the planner's tables."""
    tensors, liveness = assembly.tensors, _analyze(assembly)
    classes: dict[Expr, int] = {}
    of = tuple(classes.setdefault(tensors[n].nbytes, len(classes)) for n in liveness.names)
    nbytes = sizes_of(classes)
    seed, samples = _expected_sizes(nbytes.compile(dims), len(classes), dims)
    workload = Workload(liveness.lifetimes, of, liveness.names)
    orders = find_orientations(planner, workload, seed, samples)
    return MemoryTables(planner, liveness, of, nbytes, orders)


def _analyze(assembly: Assembly) -> Liveness:
    tensors = assembly.tensors
    uses = [
        LaunchUse(x.name, x.reads, x.writes, x.workspaces, x.inplace) for x in assembly.launches
    ]
    return analyze(
        uses,
        outside=[n for n, t in tensors.items() if t.kind != "intermediate"],
        size_of={n: to_python(t.nbytes) for n, t in tensors.items()},
    )


def _expected_sizes(
    class_nbytes: Evaluate, count: int, dims: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Return class sizes at expected shapes: the planner is tuned for these, and valid for all."""
    expected = [(1, 16), (1, 128), (4, 64), (8, 128), (16, 512), (1, 512)]
    rows = []
    for batch, seq in expected:
        shape = [batch if k == 0 or "_d0" in n else seq for k, n in enumerate(dims)]
        try:
            rows.append([max(1, x) for x in class_nbytes(*shape)])
        except (ArithmeticError, ValueError):  # the model does not take this size: division by zero
            continue
    if not rows:  # any sizes will do
        rows = [[1 << (k % 8 + 8) for k in range(count)]]
    return rows[min(3, len(rows) - 1)], rows
