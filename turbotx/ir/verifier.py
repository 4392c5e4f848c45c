"""Verifier: invariants of graphs, regions, kernels and launches, checked independently of the
stages that make them.

In: a stage's output. Out: nothing, or a VerifyError that names the node, value or launch, for
example::

    VerifyError: fused_add_gelu: value 'erf' is used before it is made
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import fx

from turbotx import ir
from turbotx.errors import VerifyError
from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import Expr, product
from turbotx.ir.memory_order import by_order
from turbotx.ir.primitives import PRIMITIVES, REDUCTIONS, SCANS
from turbotx.ir.quantized_ops import LEVELS
from turbotx.ir.strides import contiguous_strides
from turbotx.ir.views import SPLITS, is_view


def check_graph(graph: fx.Graph) -> None:
    """Check that every node has a value, shapes use named dims, and nodes precede their uses.

    Raises VerifyError naming the node.
    """
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        for source in node.all_input_nodes:
            if source not in seen:
                raise VerifyError(f"{node.name} uses {source.name}, which comes after it")
        seen.add(node)
        if node.op == "output":
            continue
        if "val" not in node.meta:
            raise VerifyError(f"{node.name} ({node.target}) has no value in its metadata")
        if g.is_tensor(node):
            _check_dims(node)


def check_inputs(graph: fx.Graph, sizes: Sequence[Sequence[Expr]]) -> None:
    """Raise VerifyError if an input's sizes differ from the capture's: a pass specialized one."""
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    for node, wanted in zip(inputs, sizes, strict=True):
        if g.shape(node) != by_order(wanted, node.meta.get("order")):
            raise VerifyError(
                f"{node.name} was captured as {tuple(wanted)}, and is {g.shape(node)} after the "
                "passes: one of them has fixed a size to the example's"
            )


def _check_dims(node: fx.Node) -> None:
    for d, extent in enumerate(g.shape(node)):
        if extent.is_Integer and extent < 0:
            raise VerifyError(f"{node.name} has the negative size {extent} in dim {d}")
        if not extent.is_integer:
            raise VerifyError(f"{node.name} has {extent} in dim {d}, which is no integer")


def check_region(nodes: Sequence[fx.Node], outputs: Collection[fx.Node]) -> None:
    """Check that a region is convex (no path leaves it and returns) and owns its outputs.

    Raises VerifyError naming the node.
    """
    inside = set(nodes)
    for node in outputs:
        if node not in inside:
            raise VerifyError(f"the region's output {node.name} is not in the region")
    after: set[fx.Node] = set()
    for node in _between(nodes):
        reached = any(n in after or n in inside for n in node.all_input_nodes)
        if g.is_size(node):  # known before any launch
            continue
        if node in inside and any(n in after for n in node.all_input_nodes):
            raise VerifyError(f"a path leaves the region and comes back at {node.name}")
        if node not in inside and reached and not _is_view_of_inside(node, inside, after):
            after.add(node)


def _between(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the graph's nodes from the first to the last of some, which need not be in order."""
    left, before, after = set(nodes), list[fx.Node](), list[fx.Node]()
    node = nodes[0]
    while left and node.op != "root":
        after.append(node)
        left.discard(node)
        node = node.next
    node = nodes[0]
    while left:
        node = node.prev
        before.append(node)
        left.discard(node)
    return [*reversed(before), *after]


def _is_view_of_inside(node: fx.Node, inside: set[fx.Node], after: set[fx.Node]) -> bool:
    """Return whether a node is a view or split of the region's own values, and thus moves with its
    reader."""
    if not is_view(node) and node.target not in SPLITS:
        return False
    return not any(n in after for n in node.all_input_nodes)


def check_kernel(kernel: ir.Kernel) -> None:
    """Check that values are defined once and before use, offsets use known axes, and stores write
    outputs.

    Raises VerifyError naming the value or param.
    """
    params = {p.name: p for p in kernel.params}
    axes = {a.name for a in kernel.axes}
    if len(params) != len(kernel.params) or len(axes) != len(kernel.axes):
        raise VerifyError(f"{kernel.name}: two params or two axes have one name")
    made: dict[str, torch.dtype] = {}
    stored: set[str] = set()
    for s in kernel.body:
        for name in ir.needs_of(s):
            if name not in made:
                raise VerifyError(f"{kernel.name}: value {name!r} is used before it is made")
        for name in ir.results_of(s):
            if name in made or name in params or name in axes:
                raise VerifyError(f"{kernel.name}: {name!r} is made twice")
            made[name] = _dtype_of(s)
        _check_statement(kernel, s, params, axes, made)
        if isinstance(s, ir.Store):
            stored.add(s.access.param)
    for p in kernel.params:
        if p.role == "out" and p.name not in stored:
            raise VerifyError(f"{kernel.name}: the output {p.name!r} is never stored")
    _check_reductions(kernel)


def _dtype_of(s: ir.Statement) -> torch.dtype:
    """Return the dtype of a statement's result."""
    assert not isinstance(s, (ir.Store, ir.Check)), "it makes nothing"
    return s.dtype


def _check_statement(
    kernel: ir.Kernel,
    s: ir.Statement,
    params: dict[str, ir.Param],
    axes: set[str],
    made: dict[str, torch.dtype],
) -> None:
    if isinstance(s, (ir.Load, ir.Store)):
        role = "in" if isinstance(s, ir.Load) else "out"
        param = params.get(s.access.param)
        if param is None or param.role != role:
            raise VerifyError(f"{kernel.name}: {s.access.param!r} is no {role} param")
    for value in ir.expressions_of(s):
        for symbol in value.free_symbols:
            if symbol.name[0] == "@" and symbol.name[1:] not in axes:
                raise VerifyError(f"{kernel.name}: no axis is called {symbol.name[1:]!r}")
    if isinstance(s, ir.Compute):
        if s.op not in PRIMITIVES:
            raise VerifyError(f"{kernel.name}: no primitive is called {s.op!r}")
        kinds = {made[a] for a in (s.args[1:] if s.op == "where" else s.args)}
        if len(kinds) > 1:
            raise VerifyError(f"{kernel.name}: {s.result!r} mixes {sorted(map(str, kinds))}")
    if isinstance(s, ir.Reduce) and s.op not in REDUCTIONS:
        raise VerifyError(f"{kernel.name}: no reduction is called {s.op!r}")
    if isinstance(s, ir.Scan) and s.op not in SCANS:
        raise VerifyError(f"{kernel.name}: no scan is called {s.op!r}")


def _check_reductions(kernel: ir.Kernel) -> None:
    if any(isinstance(s, (ir.Reduce, ir.Scan)) for s in kernel.body) and not kernel.columns:
        raise VerifyError(f"{kernel.name}: it reduces or scans, and has no row axis")


def check_launches(
    tensors: dict[str, ir.Tensor], launches: Sequence[ir.Launch], returned: Collection[str]
) -> None:
    """Check that tensors are written before they are read, that all outputs are written, and that
    operands have their tensors' dtypes: storing wider elements would overwrite what follows.

    Raises VerifyError naming the launch.
    """
    written = {n for n, t in tensors.items() if t.kind in ("input", "parameter", "hoisted")}
    for launch in launches:
        for name in launch.reads:
            if name not in tensors:
                raise VerifyError(f"{launch.name} reads {name!r}, which does not exist")
            if name not in written:
                raise VerifyError(f"{launch.name} reads {name!r} before it is written")
        for name in launch.writes:
            kind = tensors[name].kind
            stores = isinstance(launch, ir.AttentionLaunch) and launch.kernel.stores
            is_cache = kind == "input" and (stores or isinstance(launch, ir.StoreLaunch))
            if kind not in ("intermediate", "output") and not is_cache:
                raise VerifyError(f"{launch.name} writes {name!r}, which is {kind} memory")
            written.add(name)
        _check_inplace_pairs(tensors, launch)
        _check_dtypes(launch, tensors)
    for name in returned:
        if name not in written:
            raise VerifyError(f"the output {name!r} is never written")


def _check_dtypes(launch: ir.Launch, tensors: dict[str, ir.Tensor]) -> None:
    for operand in launch.operands:
        if operand is not None and operand.dtype != tensors[operand.tensor].dtype:
            made = tensors[operand.tensor].dtype
            raise VerifyError(
                f"{launch.name} takes {operand.tensor!r} for {operand.dtype}, and it is {made}"
            )
    if isinstance(launch, ir.KernelLaunch):
        for param, given in zip(launch.kernel.params, launch.args, strict=True):
            if given.dtype != param.dtype:
                raise VerifyError(
                    f"{launch.name} reads or writes {given.tensor!r} as {param.dtype}, and it is "
                    f"{given.dtype}"
                )
    if isinstance(launch, (ir.GroupedGemmLaunch, ir.RouteLaunch)):
        _check_experts(launch)
    if isinstance(launch, ir.GemmLaunch) and launch.int8 is not None:
        _check_int8(launch, launch.int8)
    operands = [x for x in _of_one_dtype(launch) if x is not None]
    if len({x.dtype for x in operands}) > 1:
        shown = ", ".join(f"{x.tensor!r} of {x.dtype}" for x in operands)
        raise VerifyError(f"{launch.name} computes in one dtype, and is given {shown}")


def _check_int8(launch: ir.GemmLaunch, int8: ir.Int8Operands) -> None:
    narrow = [launch.weight, *((launch.x,) if int8.x_scale is not None else ())]
    floats = (int8.weight_scale, int8.x_scale)
    bits = (int8.x_peaks, int8.peaks)
    whole = torch.uint8 if int8.group else launch.weight.dtype
    if not int8.group and whole not in LEVELS:
        raise VerifyError(f"{launch.name} multiplies by {launch.weight.tensor!r} of {whole}")
    given = ((narrow, whole), (floats, torch.float32), (bits, torch.int32))
    for operands, dtype in given:
        for operand in operands:
            if operand is not None and operand.dtype is not dtype:
                raise VerifyError(
                    f"{launch.name} takes {operand.tensor!r} of {dtype}, and it is {operand.dtype}"
                )
    held = int8.weight_scale.shape
    if (held[:1] if int8.group else held) != launch.weight.shape[:1]:
        raise VerifyError(f"{launch.name} has {int8.weight_scale.shape} scales for its weight")
    if int8.x_scale is not None and product(int8.x_scale.shape) != launch.rows:
        raise VerifyError(f"{launch.name} has {int8.x_scale.shape} scales for {launch.rows} rows")
    for peaks in (p for p in bits if p is not None):
        if peaks.shape[0] != launch.rows:
            raise VerifyError(f"{launch.name} has peaks of {peaks.shape} for {launch.rows} rows")


def _of_one_dtype(launch: ir.Launch) -> tuple[ir.Operand | None, ...]:
    if isinstance(launch, ir.GemmLaunch):
        # With a folded norm, the bias is float32.
        bias = launch.bias if launch.norm is None else None
        if launch.int8 is not None:
            x = None if launch.x.dtype in LEVELS else launch.x
            return x, bias, launch.out, launch.residual
        return launch.x, launch.weight, bias, launch.out, launch.residual
    if isinstance(launch, ir.GroupedGemmLaunch):
        return launch.x, launch.weight, launch.out
    if isinstance(launch, ir.AttentionLaunch):
        return launch.q, launch.k, launch.v, launch.out
    if isinstance(launch, ir.StoreLaunch):
        return launch.held, launch.new
    return ()


def _check_experts(launch: ir.GroupedGemmLaunch | ir.RouteLaunch) -> None:
    """Check a launch on experts: dense int32 ends, one per expert, and sizes that are passed once
    but used for several operands must be equal."""
    same: list[tuple[Expr, Expr]]
    if isinstance(launch, ir.GroupedGemmLaunch):
        experts, columns, depth = launch.weight.shape
        made = launch.out.shape[-1] * (2 if launch.gemm.gated else 1)
        same = [
            (launch.ends.shape[0], experts), (columns, made), (launch.x.shape[-1], depth),
            (launch.out.shape[0], launch.rows),
        ]  # fmt: skip
        whole = [(launch.ends, torch.int32), (launch.out, launch.out.dtype)]
    else:
        rows = launch.chosen.shape[0]
        same = [(launch.order.shape[0], rows), (launch.place.shape[0], rows)]
        longs = (launch.chosen, launch.order, launch.place)
        whole = [*((x, torch.int64) for x in longs), (launch.ends, torch.int32)]
    for one, other in same:
        if one != other:
            raise VerifyError(f"{launch.name} takes {one} and {other} for one size")
    for given, dtype in whole:
        if given.dtype != dtype or given.strides != contiguous_strides(given.shape):
            shown = f"{given.dtype} by strides {given.strides}"
            raise VerifyError(f"{launch.name} takes {given.tensor!r} for dense {dtype}: {shown}")


def _check_inplace_pairs(tensors: dict[str, ir.Tensor], launch: ir.Launch) -> None:
    """Check that each in-place pair is one tensor written and one read, each whole and used by one
    operand only (the kernel's own accesses are checked on its source)."""
    operands = [a for a in launch.operands if a is not None]
    for out, given in launch.inplace:
        what = f"{launch.name} may write {out!r} over {given!r}"
        if out not in launch.writes or given not in launch.reads:
            raise VerifyError(f"{what}, and does not write the one or read the other")
        if tensors[out].dtype != tensors[given].dtype:
            raise VerifyError(f"{what}, of another dtype")
        for name in (out, given):
            shown = [a for a in operands if a.tensor == name]
            if len(shown) != 1 or shown[0].offset != 0:
                raise VerifyError(f"{what}, and {name!r} is shown {len(shown)} times or in part")
