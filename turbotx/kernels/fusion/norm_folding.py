"""Norms between GEMMs: finds LayerNorms and RMSNorms that can be computed in the GEMMs around them.

In: the fused regions. Out: a `NormFold` for each norm whose rows come from one GEMM and whose
result only GEMMs read, as their x or as their residual; it then needs no launch of its own. The
last norm of a BERT is also a model output, so its kernel stays, without the residual::

    linear, [add, add, layer_norm], linear  ->  NormFold(add, layer_norm, "layer", 1e-12)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import ONE, product
from turbotx.ir.matmul_kernels import RowNorm
from turbotx.ir.strides import layout_of, reshape_strides
from turbotx.kernels.fusion.epilogue import (
    Epilogue,
    is_grouped,
    is_packable,
    match_epilogue,
    packable_inputs,
)
from turbotx.kernels.fusion.fuse import FusedRegion
from turbotx.passes.partition import Region

aten = torch.ops.aten
# A weight times gamma is a copy: not worth the memory for a vocabulary.
MOST_ROWS = 16


@dataclass(frozen=True)
class NormFold:
    """A norm of `rows` with the output `result`, and the epilogue of the GEMM that produces the
    rows.

    stored: a kernel still computes and stores the result, for readers other than GEMMs; folding
    then helps because the GEMM's residual is the result of another folded norm.
    """

    rows: fx.Node
    result: fx.Node
    norm: RowNorm
    gamma: fx.Node | None
    beta: fx.Node | None
    end: Epilogue
    fused: FusedRegion
    stored: bool = False

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The calls that compute the result from the rows."""
        before = set(self.end.nodes)
        return tuple(n for n in self.fused.region.nodes if n not in before)


def find_folds(
    fused: Sequence[FusedRegion], kinds: Mapping[fx.Node, str],
    epilogues: Mapping[fx.Node, Epilogue],
) -> dict[fx.Node, NormFold]:  # fmt: skip
    """Return the norms that can be folded, by their results. `epilogues`: those already found."""
    found: dict[fx.Node, NormFold] = {}
    for f in fused:
        for result in f.region.outputs:
            fold = _match(f, result, fused, kinds)
            if fold is not None:
                found[result] = fold
                break
    joined = {n: e for e in epilogues.values() for n in e.nodes}
    ends = joined | {n: fold.end for fold in found.values() for n in fold.end.nodes}
    found = {
        r: fold if _is_read_by_gemms(r, fused, kinds, ends) else replace(fold, stored=True)
        for r, fold in found.items()
    }
    folded = {r for r, fold in found.items() if not fold.stored}
    return {r: fold for r, fold in found.items() if r in folded or _residual_of(fold.end) in folded}


def _residual_of(end: Epilogue) -> fx.Node | None:
    """Return the tensor behind a residual's views."""
    layout = None if end.residual is None else layout_of(end.residual)
    return None if layout is None else layout.root


def _match(
    f: FusedRegion, result: fx.Node, fused: Sequence[FusedRegion], kinds: Mapping[fx.Node, str]
) -> NormFold | None:
    """Match a region as the epilogue of one linear and a norm of it."""
    matched = _layer_norm(result) or _rms_norm(result)
    if matched is None:
        return None
    rows, norm, gamma, beta = matched
    inside = set(f.region.nodes)
    if rows not in inside or not set(f.region.outputs) <= {rows, result}:
        return None
    if g.dtype(rows) != g.dtype(result) or g.shape(rows) != g.shape(result):
        return None
    if not all(p is None or _is_row(p, rows, kinds) for p in (gamma, beta)):
        return None
    before = _ancestors(rows, inside)
    after = _ancestors(result, inside) - before
    if before | after != inside:
        return None
    region = Region(tuple(n for n in f.region.nodes if n in before), (rows,))
    for linear in packable_inputs(f, fused, kinds):
        if (
            linear in region.inputs
            and not is_grouped(linear)
            and _has_adjacent_elements(linear.args[1])
        ):
            end = match_epilogue(region, linear, kinds)
            if end is not None:
                return NormFold(rows, result, norm, gamma, beta, end, f)
    return None


def _ancestors(node: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    """Return the nodes of a region that a node depends on, including itself."""
    found: set[fx.Node] = set()
    left = [node]
    while left:
        at = left.pop()
        if at not in found:
            found.add(at)
            left += at.all_input_nodes
    return found & inside


# --- patterns of norms ---

Matched = tuple[fx.Node, RowNorm, fx.Node | None, fx.Node | None]


def _layer_norm(result: fx.Node) -> Matched | None:
    if not g.is_call(result, aten.layer_norm.default):
        return None
    if len(g.argument(result, "normalized_shape")) != 1:
        return None
    rows, gamma, beta = (g.argument(result, name) for name in ("input", "weight", "bias"))
    return rows, RowNorm("layer", float(g.argument(result, "eps"))), gamma, beta


def _rms_norm(result: fx.Node) -> Matched | None:
    """Match PyTorch's own, or x * rsqrt(mean(x^2) + eps) * gamma as models write it."""
    if g.is_call(result, aten.rms_norm.default):
        if len(g.argument(result, "normalized_shape")) != 1:
            return None
        rows, gamma, eps = (g.argument(result, name) for name in ("input", "weight", "eps"))
        eps = torch.finfo(g.dtype(rows)).eps if eps is None else eps
        return rows, RowNorm("rms", float(eps)), gamma, None
    value = _uncast(result)
    for scaled, gamma in _factors(value):
        if len(g.shape(gamma)) == 1:
            found = _unscaled_rms(_uncast(scaled))
            if found is not None:
                return found[0], RowNorm("rms", found[1]), gamma, None
    found = _unscaled_rms(value)
    return None if found is None else (found[0], RowNorm("rms", found[1]), None, None)


def _unscaled_rms(value: fx.Node) -> tuple[fx.Node, float] | None:
    """Match x * rsqrt(mean(x^2) + eps); return x and eps."""
    for x, root in _factors(value):
        if not g.is_call(root, aten.rsqrt.default):
            continue
        total: Any = root.args[0]
        if not g.is_call(total, aten.add.Tensor, aten.add.Scalar) or total.kwargs:
            continue
        mean, eps = total.args[:2]
        if not isinstance(eps, float) or not g.is_call(mean, aten.mean.dim):
            continue
        square, dims, *keep = mean.args
        if list(dims) not in ([-1], [len(g.shape(x)) - 1]) or keep != [True]:
            continue
        if _square_of(square) is _uncast(x):
            return _uncast(x), eps
    return None


def _square_of(node: Any) -> fx.Node | None:
    if g.is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == 2:
        return _uncast(node.args[0])
    if g.is_call(node, aten.mul.Tensor) and node.args[0] is node.args[1]:
        return _uncast(node.args[0])
    return None


def _factors(node: Any) -> list[tuple[fx.Node, fx.Node]]:
    """Return both orders of a product of two tensors."""
    if not g.is_call(node, aten.mul.Tensor):
        return []
    a, b = node.args
    return [(a, b), (b, a)] if g.is_tensor(a) and g.is_tensor(b) else []


def _uncast(node: Any) -> Any:
    casts = g.is_call(node, aten._to_copy.default) and set(node.kwargs) == {"dtype"}
    return node.args[0] if casts else node


# --- readers and producers ---


def _is_row(node: fx.Node, rows: fx.Node, kinds: Mapping[fx.Node, str]) -> bool:
    """Return whether a node is a parameter with one element per column of a row."""
    layout = layout_of(node)
    known = layout is not None and kinds[layout.root] in ("parameter", "hoisted")
    return known and g.shape(node) == g.shape(rows)[-1:] and g.dtype(node).is_floating_point


def _is_read_by_gemms(
    result: fx.Node, fused: Sequence[FusedRegion], kinds: Mapping[fx.Node, str],
    ends: Mapping[fx.Node, Epilogue],
) -> bool:  # fmt: skip
    """Return whether only GEMMs read a norm's result, as a whole: as x, or as a residual.

    ends: the epilogue that each node belongs to.
    """
    views = [result]
    while views:
        for user in views.pop().users:
            if kinds[user] == "view":
                views.append(user)
            elif kinds[user] == "size":
                continue
            elif user in ends and user.target is not aten.linear.default:
                residual = ends[user].residual
                if residual is None or not _is_whole(residual, result):
                    return False
                if not _has_adjacent_elements(ends[user].linear.args[1]):
                    return False
            elif not _takes_as_x(user, result, kinds):
                return False
    made = {ends[n].output for f in fused for n in f.region.nodes if n in ends}
    readers = [f for f in fused if any(result in k.operands for k in f.kernels)]
    return all(made & {*f.region.nodes} or result in f.region.nodes for f in readers)


def _takes_as_x(user: fx.Node, result: fx.Node, kinds: Mapping[fx.Node, str]) -> bool:
    if not is_packable(user, kinds) or is_grouped(user):
        return False
    if any(n is result for n in user.args[1:]):
        return False
    width = g.shape(result)[-1]
    few = int(g.shape(g.operand(user, 1))[0]) <= MOST_ROWS * int(width)
    return few and _is_whole(user.args[0], result)


def _is_whole(node: Any, result: fx.Node) -> bool:
    """Return whether a view contains all rows of a result, in order."""
    layout, width = layout_of(node), g.shape(result)[-1]
    if layout is None or layout.root is not result or layout.shape[-1] != width:
        return False
    rows = product(layout.shape[:-1])
    flat = reshape_strides(layout, (rows, width))
    same = layout.offset == 0 and rows == product(g.shape(result)[:-1])
    return bool(same and flat is not None and flat[0] in (width, 0) and flat[1] in (ONE, 0))


def _has_adjacent_elements(weight: Any) -> bool:
    """Return whether a template can read a weight: its rows or columns are contiguous."""
    layout = layout_of(weight)
    return layout is not None and 1 in layout.strides
