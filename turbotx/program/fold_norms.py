"""Norm folding: moves the computation of norms into the GEMMs around them.

In: a rewritten graph, its regions, the norms that can be folded. Out: an assembly without the
norms' kernels. For a BERT layer::

    linear_0, fused_add_layer_norm_0, linear_gelu_0
      ->  linear_add_0 (stores rows and statistics), linear_gelu_0 (normalises its input)

The constants that such GEMMs read are computed from the parameters, as packed weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from sympy import Integer
from torch import fx

from turbotx import ir
from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import Expr, product
from turbotx.ir.strides import layout_of, layout_with_copies
from turbotx.kernels.fusion.epilogue import Epilogue
from turbotx.kernels.fusion.fuse import FusedRegion, fuse
from turbotx.kernels.fusion.norm_folding import NormFold
from turbotx.kernels.triton.gemm_template import NARROWEST
from turbotx.passes.extract import extract
from turbotx.passes.partition import Region
from turbotx.program.assemble import assemble
from turbotx.program.assembly import Assembled, Assembly, dense, over
from turbotx.program.folded_weights import (
    fold_scales,
    fold_shift,
    fold_sums,
    fold_weight,
    join_affine,
)


def assemble_folded(
    graph: fx.Graph, fused: Sequence[FusedRegion], hoisted: frozenset[fx.Node],
    dims: Sequence[str], epilogues: Mapping[fx.Node, Epilogue], folds: Mapping[fx.Node, NormFold],
) -> Assembled:  # fmt: skip
    """Return the launches with norms folded, and the regions and epilogues that remain.

    folds: by the norm's result node.
    """
    made = {id(f.fused): f for f in folds.values()}
    regions = [part for f in fused for part in _split(f, made.get(id(f)))]
    ends = {**epilogues, **{f.end.linear: f.end for f in folds.values()}}
    assembly = assemble(graph, regions, hoisted, dims, ends)
    folding = _Folding(assembly, graph, hoisted, folds, ends)
    assembly.launches[:] = [folding.fold(x) for x in assembly.launches]
    drop_unread(assembly)
    return Assembled(assembly, regions, ends)


def _split(f: FusedRegion, fold: NormFold | None) -> list[FusedRegion]:
    """Return the regions that remain of one whose norm is folded: the GEMM's epilogue and the
    rest."""
    if fold is None:
        return [f]
    if not fold.stored:
        return [replace(f, region=Region(f.region.nodes, (fold.rows,)), kernels=())]
    before = tuple(n for n in f.region.nodes if n not in fold.nodes)
    rest = fuse(Region(fold.nodes, (fold.result,)))
    return [FusedRegion(Region(before, (fold.rows,))), rest]


class _Folding:
    def __init__(
        self, assembly: Assembly, graph: fx.Graph, hoisted: frozenset[fx.Node],
        folds: Mapping[fx.Node, NormFold], ends: Mapping[fx.Node, Epilogue],
    ) -> None:  # fmt: skip
        self.assembly, self.hoisted = assembly, hoisted
        folded = [f for f in folds.values() if not f.stored]
        self.by_result = {f.result.name: f for f in folded}
        self.by_rows = {f.rows.name: f for f in folded}
        self.ends = {e.output.name: e for e in ends.values()}
        self.nodes = {n.name: n for n in graph.nodes}
        self.constants = _Constants(assembly)

    def fold(self, launch: ir.Launch) -> ir.Launch:
        """Return a launch with norms folded; only GEMMs change."""
        if not isinstance(launch, ir.GemmLaunch):
            return launch
        x, weight, bias = launch.x, launch.weight, launch.bias
        out, residual = launch.out, launch.residual
        before = self.by_result.get(x.tensor)
        added = None if residual is None else self.by_result.get(residual.tensor)
        left = self.by_rows.get(out.tensor)
        if before is None and added is None and left is None:
            return launch
        node = self.nodes[out.tensor]
        end = self.ends.get(out.tensor) or Epilogue(node, node, (node,), *node.args[2:])
        norm = ir.NormOperands(stats=None if left is None else self._statistics(left))
        if before is not None:
            x = replace(x, tensor=before.rows.name)
            weight, bias, sums, scales = self._constants_of(end, before)
            norm = replace(norm, sums=sums, scales=scales, x_stats=self._statistics(before))
        if added is not None and residual is not None:
            residual = replace(residual, tensor=added.rows.name)
            affine = self._affine(added, end.linear.args[1])
            statistics = self._statistics(added)
            norm = replace(norm, residual_affine=affine, residual_stats=statistics)
        kind = replace(
            launch.gemm,
            norm=None if before is None else before.norm,
            residual_norm=None if added is None else added.norm,
            stats=left is not None,
        )
        inplace = residual is not None and residual.tensor != x.tensor
        norms = [f for f in (before, added) if f is not None]
        source = [n.name for f in norms for n in f.nodes]
        return replace(
            launch, gemm=kind, x=x, weight=weight, bias=bias, residual=residual, norm=norm,
            call=mean_from(self.assembly, end, self._allowed(end, norms), out),
            source=", ".join(dict.fromkeys([*source, launch.source])),
            inplace=((out.tensor, residual.tensor),) if inplace and residual is not None else (),
        )  # fmt: skip

    def _statistics(self, fold: NormFold) -> ir.Operand:
        """Return the operand for the statistics of a norm's rows, sized for the narrowest tile."""
        name, shape = f"{fold.rows.name}_stats", g.shape(fold.rows)
        tiles = -(-int(shape[-1]) // NARROWEST)
        sizes: tuple[Expr, ...] = (Integer(2), product(shape[:-1]), Integer(tiles))
        tensor = ir.Tensor(name, "intermediate", torch.float32, sizes)
        return dense(self.assembly.tensors.setdefault(name, tensor))

    def _constants_of(
        self, end: Epilogue, fold: NormFold
    ) -> tuple[ir.Operand, ir.Operand | None, ir.Operand | None, ir.Operand | None]:
        """Return weight, bias, sums and scales of the linear that follows a norm."""
        weight, make = end.linear.args[1], self.constants.make
        assert isinstance(weight, fx.Node)
        n, k = (int(e) for e in g.shape(weight))
        dtype, name, f32 = g.dtype(weight), end.linear.name, torch.float32
        scales = None
        if dtype is torch.float16 and fold.gamma is not None:
            scales = make(f"{name}_scales", fold_scales, (weight, fold.gamma), f32, (n,))
        given = (weight, fold.gamma, scales)
        folded = make(f"{name}_folded", fold_weight, given, dtype, (n, k))
        sums = shift = None
        if fold.norm.kind == "layer" and dtype is not torch.float32:
            sums = make(f"{name}_sums", fold_sums, (folded, scales), f32, (n,))
        if fold.beta is not None or end.bias is not None:
            shift = make(f"{name}_shift", fold_shift, (weight, fold.beta, end.bias), f32, (n,))
        held, optional = self.constants.operand, self.constants.optional
        return held(folded), optional(shift), optional(sums), optional(scales)

    def _affine(self, fold: NormFold, like: Any) -> ir.Operand:
        """Return gamma and beta of a norm, for a residual that is normalised again.

        like: a weight with as many rows.
        """
        width = int(g.shape(fold.rows)[-1])
        given = (like, fold.gamma, fold.beta)
        name = f"{fold.result.name}_affine"
        made = self.constants.make(name, join_affine, given, torch.float32, (2, width))
        return self.constants.operand(made)

    def _allowed(self, end: Epilogue, norms: Iterable[NormFold]) -> set[fx.Node]:
        # Unfolded weights are not hoisted here.
        return {*end.nodes, *self.hoisted, *(n for fold in norms for n in fold.nodes)}


def mean_from(
    assembly: Assembly, end: Epilogue, allowed: set[fx.Node], out: ir.Operand
) -> ir.AtenCall:
    """Return the PyTorch call equivalent to a launch that computes the nodes of `allowed`."""
    given = _find_given(end.output, allowed)
    meant = extract([end.output], given, end.name)
    reads = [_operand(assembly, n) for n in given]
    return ir.AtenCall(meant.module, (*reads, *meant.sizes), {}, (out,))


def _operand(assembly: Assembly, node: fx.Node) -> ir.Operand:
    layout = layout_with_copies(node)  # copies are launches of the assembly already
    assert layout.root.name in assembly.tensors, f"nothing holds {layout.root}"
    return over(layout, g.dtype(node))


def drop_unread(assembly: Assembly) -> None:
    """Drop tensors that only removed kernels and unfolded weights needed."""
    used = set(assembly.returned)
    for launch in assembly.launches:
        used |= {*launch.reads, *launch.writes}
    for name, tensor in list(assembly.tensors.items()):
        if name not in used and tensor.kind in ("intermediate", "hoisted"):
            del assembly.tensors[name]
            assembly.hoisted.pop(name, None)


def _find_given(output: fx.Node, allowed: set[fx.Node]) -> list[fx.Node]:
    """Return the input tensors from which nodes of `allowed` and their views compute `output`."""
    given: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()

    def visit(node: fx.Node) -> None:
        if node in seen:
            return
        seen.add(node)
        if g.is_tensor(node):
            layout = layout_of(node)
            if layout is None or layout.root not in allowed:
                given[node] = None
                return
        elif not isinstance(node.meta["val"], (list, tuple)):
            return  # a size
        for source in node.all_input_nodes:
            visit(source)

    visit(output)
    return list(given)


class _Constants:
    """Adds hoisted constants in a graph of its own, into which the parameters' nodes are copied."""

    def __init__(self, assembly: Assembly) -> None:
        self.assembly, self.graph = assembly, fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}

    def make(
        self, name: str, function: Callable[..., torch.Tensor], given: tuple[fx.Node | None, ...],
        dtype: torch.dtype, shape: tuple[int, ...],
    ) -> fx.Node:  # fmt: skip
        """Add a hoisted constant, or return the existing one of this name."""
        if name in self.assembly.hoisted:
            return self.assembly.hoisted[name]
        args = tuple(None if n is None else self._copy(n) for n in given)
        node = self.graph.create_node("call_function", function, args, name=name)
        self.assembly.hoisted[name] = node
        sizes = tuple(Integer(extent) for extent in shape)
        self.assembly.tensors[name] = ir.Tensor(name, "hoisted", dtype, sizes)
        return node

    def operand(self, node: fx.Node) -> ir.Operand:
        return dense(self.assembly.tensors[node.name])

    def optional(self, node: fx.Node | None) -> ir.Operand | None:
        return None if node is None else self.operand(node)

    def _copy(self, node: fx.Node) -> fx.Node:
        if node.graph is self.graph:
            return node
        if node not in self._copies:
            for source in node.all_input_nodes:
                self._copy(source)
            self._copies[node] = self.graph.node_copy(node, self._copies.__getitem__)
        return self._copies[node]
