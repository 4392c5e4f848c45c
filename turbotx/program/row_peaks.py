"""Row peaks: products quantise the rows that they read, and no kernel does it before them.

In: a rewritten graph, its regions, the kernels that can go. Out: an assembly without those. For a
BERT layer, whose norms quantise what they make::

    attention, fused_row_scale_quantize_rows, linear_int8
        ->  attention (leaves rows and magnitudes), linear_int8 (quantises what it reads)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from sympy import Integer
from torch import fx

from turbotx import ir
from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import product
from turbotx.ir.quantized_ops import quantize_rows, quantized_linear
from turbotx.ir.strides import layout_of
from turbotx.kernels.fusion.epilogue import Epilogue, bias_of
from turbotx.kernels.fusion.fuse import FusedRegion
from turbotx.kernels.fusion.row_peaks import PeakFold, find_peaks
from turbotx.kernels.triton.gemm_template import NARROWEST
from turbotx.passes.partition import Region
from turbotx.program.assemble import assemble
from turbotx.program.assembly import Assembled, Assembly, dense, over
from turbotx.program.fold_norms import drop_unread, mean_from


def assemble_with_peaks(
    graph: fx.Graph, fused: Sequence[FusedRegion], hoisted: frozenset[fx.Node],
    dims: Sequence[str], epilogues: Mapping[fx.Node, Epilogue], kinds: Mapping[fx.Node, str],
) -> list[Assembled]:  # fmt: skip
    """Return the launches of a graph whose products quantise their rows where they can; nothing
    where none can."""
    folds = find_peaks(fused, kinds, epilogues)
    if not folds:
        return []
    made = {id(f.fused): f for f in folds}
    regions = [_without_kernels(f, made.get(id(f))) for f in fused]
    ends = {**epilogues, **{f.end.linear: f.end for f in folds if f.end is not None}}
    assembly = assemble(graph, regions, hoisted, dims, ends)
    by_narrow, by_maker = {f.narrow.name: f for f in folds}, {f.maker.name: f for f in folds}
    outputs = {e.output.name: e for e in ends.values()}
    nodes = {n.name: n for n in graph.nodes}
    for k, launch in enumerate(assembly.launches):
        if isinstance(launch, (ir.GemmLaunch, ir.AttentionLaunch)):
            left = by_maker.get(launch.out.tensor)
            launch = launch if left is None else _leave(assembly, launch, left)
        if isinstance(launch, ir.GemmLaunch) and launch.x.tensor in by_narrow:
            node = nodes[launch.out.tensor]
            end = outputs.get(node.name) or Epilogue(node, node, (node,), bias_of(node))
            launch = _read(assembly, launch, by_narrow[launch.x.tensor], end)
        assembly.launches[k] = launch
    drop_unread(assembly)
    return [Assembled(assembly, regions, ends)]


def _without_kernels(f: FusedRegion, fold: PeakFold | None) -> FusedRegion:
    """Return a region as it is, or as what its product does: what is read is never made."""
    if fold is None:
        return f
    outputs = (fold.narrow,) if fold.end is None else (fold.rows,)
    return replace(f, region=Region(f.region.nodes, outputs), kernels=())


def _peaks(assembly: Assembly, fold: PeakFold) -> ir.Operand:
    """Return where the largest magnitudes of rows lie: of each head, or with room for those of the
    narrowest tiles."""
    shape = g.shape(fold.maker)
    by_gemm = fold.end is not None or len(g.shape(fold.rows)) == len(shape)
    parts = Integer(-(-int(shape[-1]) // NARROWEST)) if by_gemm else shape[2]
    name = f"{fold.maker.name}_peaks"
    sizes = (product(g.shape(fold.rows)[:-1]), parts)
    tensor = ir.Tensor(name, "intermediate", torch.int32, sizes)
    return dense(assembly.tensors.setdefault(name, tensor))


def _leave(
    assembly: Assembly, launch: ir.GemmLaunch | ir.AttentionLaunch, fold: PeakFold
) -> ir.GemmLaunch | ir.AttentionLaunch:
    peaks = _peaks(assembly, fold)
    if isinstance(launch, ir.AttentionLaunch):
        return replace(launch, kernel=replace(launch.kernel, peaks=True), peaks=peaks)
    assert launch.int8 is not None
    return replace(launch, int8=replace(launch.int8, peaks=peaks))


def _read(
    assembly: Assembly, launch: ir.GemmLaunch, fold: PeakFold, end: Epilogue
) -> ir.GemmLaunch:
    layout = layout_of(fold.rows)
    assert layout is not None and launch.int8 is not None
    x = over(layout, g.dtype(fold.rows))
    int8 = replace(launch.int8, x_scale=None, x_peaks=_peaks(assembly, fold))
    call = mean_from(assembly, end, {*end.nodes, *fold.fused.region.nodes[-2:]}, launch.out)
    inplace = tuple(pair for pair in launch.inplace if pair[1] != x.tensor)
    target: Any = call.target
    _quantize_in_product(target)
    return replace(launch, x=x, int8=int8, call=call, inplace=inplace)


def _quantize_in_product(meaning: fx.GraphModule) -> None:
    """Make products quantise the rows that they read, so that a reference in float64 has the same
    integers."""
    for node in meaning.graph.find_nodes(op="call_function", target=quantized_linear):
        narrow = g.operand(node, 0)
        if g.is_call(narrow, quantize_rows):
            node.args = (narrow.args[0], *node.args[1:4], None, node.args[5])
    meaning.graph.eliminate_dead_code()
    meaning.recompile()
