"""Views: ops that move no data, each as a map from its own index to its input's.

In: a view node and an index (one expression per dim). Out: the index of the input that holds that
element. Used by layouts, lowering and the op table, for example::

    input_index(permute(x, (0, 2, 1)), (i, j, k))  ->  (i, k, j)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.attention_ops import along_diagonals
from turbotx.ir.expr import ONE, ZERO, Expr, divide, expr, product

aten = torch.ops.aten
IndexTuple: TypeAlias = tuple[Expr, ...]
IndexMap: TypeAlias = Callable[[fx.Node, IndexTuple], IndexTuple]


def _dim(value: Any, rank: int) -> int:
    return int(value) % rank if rank else 0


def _same(node: fx.Node, index: IndexTuple) -> IndexTuple:
    return index


def _permute(node: fx.Node, index: IndexTuple) -> IndexTuple:
    inner = list(index)
    for out, source in enumerate(g.argument(node, "dims")):
        inner[_dim(source, len(index))] = index[out]
    return tuple(inner)


def _transpose(node: fx.Node, index: IndexTuple) -> IndexTuple:
    inner = list(index)
    a, b = (_dim(g.argument(node, n), len(index)) for n in ("dim0", "dim1"))
    inner[a], inner[b] = index[b], index[a]
    return tuple(inner)


def _t(node: fx.Node, index: IndexTuple) -> IndexTuple:
    return tuple(reversed(index))


def _unsqueeze(node: fx.Node, index: IndexTuple) -> IndexTuple:
    d = _dim(node.args[1], len(index))
    return index[:d] + index[d + 1 :]


def _squeeze(node: fx.Node, index: IndexTuple) -> IndexTuple:
    source = g.shape(g.operand(node, 0))
    given = node.args[1] if len(node.args) > 1 else list(range(len(source)))
    dims = given if isinstance(given, (list, tuple)) else [given]
    dropped = {_dim(d, len(source)) for d in dims} if source else set()
    dropped = {d for d in dropped if source[d] == 1}
    rest = iter(index)
    return tuple(ZERO if d in dropped else next(rest) for d in range(len(source)))


def _expand(node: fx.Node, index: IndexTuple) -> IndexTuple:
    source = g.shape(g.operand(node, 0))
    kept = index[len(index) - len(source) :]
    return tuple(ZERO if extent == 1 else i for i, extent in zip(kept, source, strict=True))


def _slice(node: fx.Node, index: IndexTuple) -> IndexTuple:
    d = _dim(g.argument(node, "dim"), len(index))
    start, step = g.argument(node, "start"), g.argument(node, "step")
    first = ZERO if start is None else g.size(start)
    if g.is_negative(start):
        extent = g.shape(g.operand(node, 0))[d]
        first = expr(sympy.Max(first + extent, ZERO))
    inner = list(index)
    inner[d] = (first + index[d] * g.size(step)).expand()
    return tuple(inner)


def _select(node: fx.Node, index: IndexTuple) -> IndexTuple:
    extents = g.shape(g.operand(node, 0))
    d = _dim(node.args[1], len(extents))
    chosen = g.size(node.args[2])
    if g.is_negative(node.args[2]):
        chosen = chosen + extents[d]
    return (*index[:d], chosen, *index[d:])


def _diagonal(node: fx.Node, index: IndexTuple) -> IndexTuple:
    rank = len(index) + 1
    a, b = (_dim(g.argument(node, n), rank) for n in ("dim1", "dim2"))
    offset = g.argument(node, "offset")
    rest = iter(index[:-1])
    at = {a: index[-1] + max(-offset, 0), b: index[-1] + max(offset, 0)}
    return tuple(at[d] if d in at else next(rest) for d in range(rank))


def _unfold(node: fx.Node, index: IndexTuple) -> IndexTuple:
    """Windows along a dim: the last index counts within the window."""
    rank = len(g.shape(g.operand(node, 0)))
    inner = list(index[:-1])
    d, step = _dim(node.args[1], rank), g.size(node.args[3])
    if rank:
        inner[d] = (inner[d] * step + index[-1]).expand()
    return tuple(inner)


def _along_diagonals(node: fx.Node, index: IndexTuple) -> IndexTuple:
    *leading, row, column = index
    return (*leading, ZERO, (column - row + g.shape(node)[-2] - 1).expand())


def _getitem(node: fx.Node, index: IndexTuple) -> IndexTuple:
    """One piece of a split, chunk or unbind."""
    split, piece = node.args
    assert isinstance(split, fx.Node) and isinstance(piece, int)
    d = _dim(g.argument(split, "dim"), len(g.shape(g.operand(split, 0))))
    if split.target is aten.unbind.int:
        return (*index[:d], g.size(piece), *index[d:])
    pieces = split.meta["val"]
    first = sum((g.size(p.shape[d]) for p in pieces[:piece]), ZERO)
    inner = list(index)
    inner[d] = (index[d] + first).expand()
    return tuple(inner)


def _reshape(node: fx.Node, index: IndexTuple) -> IndexTuple:
    raise NeedsFactoring(node)


class NeedsFactoring(Exception):
    """The index map of a reshape needs split axes: lowering splits them, layouts use strides."""


SPLITS = frozenset(
    {aten.split_with_sizes.default, aten.split.Tensor, aten.unbind.int, aten.chunk.default}
)

# target -> "affine" or "reshape"
_MAPS: dict[Any, IndexMap] = {
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _t,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.diagonal.default: _diagonal,
    aten.unfold.default: _unfold,
    along_diagonals: _along_diagonals,
    g.GETITEM: _getitem,
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.unflatten.int: _reshape,
    aten.flatten.using_ints: _reshape,
}
VIEWS: dict[Any, str] = {t: "reshape" if m is _reshape else "affine" for t, m in _MAPS.items()}


def is_view(node: Any) -> bool:
    """Return whether `node` moves no data. A getitem counts only if it selects a piece of a
    split."""
    if not isinstance(node, fx.Node) or node.target not in VIEWS:
        return False
    return node.target is not g.GETITEM or g.is_call(node.args[0], *SPLITS)


def view_source(node: fx.Node) -> fx.Node:
    """Return the tensor that a view is of (for a piece of a split, the tensor that is split)."""
    source = g.operand(node, 0)
    return g.operand(source, 0) if node.target is g.GETITEM else source


def input_index(node: fx.Node, index: IndexTuple) -> IndexTuple:
    """Return the index of the view's input that holds the view's element at `index`.

    Raises NeedsFactoring for reshapes.
    """
    return _MAPS[node.target](node, index)


def reshape_index(
    index: Sequence[Expr],
    shape: Sequence[Expr],
    source: Sequence[Expr],
    split: Callable[[Expr, Expr], tuple[Expr, Expr]],
) -> IndexTuple:
    """Return the index into `source` of element `index` of its reshape to `shape`.

    Walks both shapes from the right in groups of equal product. `split(i, n)` returns (i // n, i %
    n).
    """
    inner: list[Expr] = [ZERO] * len(source)
    flat, below = ZERO, ONE
    d = len(shape) - 1
    for s in range(len(source) - 1, -1, -1):
        extent = source[s]
        if extent == 1:
            continue
        while d >= 0 and divide(below, extent) is None:
            flat = (flat + index[d] * below).expand()
            below, d = product((below, shape[d])), d - 1
        if below == extent:
            inner[s], flat, below = flat, ZERO, ONE
            continue
        high, low = split(flat, extent)
        inner[s], flat = low, high
        below = divide(below, extent) or ONE
    return tuple(inner)
