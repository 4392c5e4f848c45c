"""Rows of the op table that create tensors, or read their inputs at other indices.

In: a node and an index into its result. Out: the element there, for example::

    embedding(table, ids)[b, s, h]  ->  table[ids[b, s], h]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import ZERO, Expr, product
from turbotx.ops.table import indexed

# --- creation -------------------------------------------------------------------------------


def _arange(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    start, step = g.argument(node, "start", 0), g.argument(node, "step", 1)
    numbers = [g.fake(v) for v in (start, step)]
    if all(not isinstance(v, float) for v in numbers):
        position = g.size(start) + g.size(step) * index[0]
        return b.cast(b.index(position.expand()), g.dtype(node))
    # In float64, as PyTorch does on a CPU: 2.1 - 2 * 1.0 loses digits in float32.
    dtype = g.dtype(node)
    wide = torch.float64 if dtype.is_floating_point else dtype
    place = b.cast(b.index(index[0]), wide)
    return b.cast(b.number(start, wide) + place * b.number(step, wide), dtype)


def _full(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    return b.number(g.argument(node, "fill_value"), g.dtype(node))


indexed("aten.arange.start_step", _arange)
indexed("aten.full.default aten.full_like.default aten.new_full.default", _full)
for _name, _value in (("zeros", 0), ("ones", 1)):
    indexed(
        f"aten.{_name}.default aten.{_name}_like.default aten.new_{_name}.default",
        lambda b, node, index, _value=_value: b.constant(_value, g.dtype(node)),
    )
indexed(
    "aten.scalar_tensor.default",
    lambda b, node, index: b.number(node.args[0], g.dtype(node)),
)

# --- indexing -------------------------------------------------------------------------------


def _embedding(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    table, ids = node.args[:2]
    row = b.element(ids, index[:-1])
    return b.element(table, (b.position(row, g.shape(table)[0]), index[-1]))


def _gather(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    """Lower gather, with one index per result element, and index_select, with one per index of a
    dim."""
    source, dim, at = node.args[:3]
    if not g.shape(source):  # 0-d source: gather at index 0
        return b.element(source, ())
    d = dim % len(index)
    places = index if node.target is torch.ops.aten.gather.default else (index[d],)
    place = b.position(b.element(at, places), g.shape(source)[d])
    return b.element(source, (*index[:d], place, *index[d + 1 :]))


def _index(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    """Lower advanced indexing: the index tensors' broadcast dims replace the first of them, or come
    first if a slice separates them."""
    source, tensors = node.args[:2]
    given = [d for d, t in enumerate(tensors) if t is not None]
    rank = max(len(g.shape(tensors[d])) for d in given)
    adjacent = given == list(range(given[0], given[-1] + 1))
    first = given[0] if adjacent else 0
    shared, rest = index[first : first + rank], index[:first] + index[first + rank :]
    kept = iter(rest)
    place: list[Any] = []
    for d, extent in enumerate(g.shape(source)):
        at = tensors[d] if d < len(tensors) else None
        if at is None:
            place.append(next(kept))
            continue
        value = b.element(at, b.broadcast(at, shared))
        place.append(b.position(value, extent, wrap=True))
    return b.element(source, tuple(place))


def _cat(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    parts = [p for p in node.args[0] if g.shape(p) != (0,)]
    d = g.argument(node, "dim") % len(index)
    start, result = ZERO, None
    pieces = []
    for part in parts:
        pieces.append((part, start))
        start = (start + g.shape(part)[d]).expand()
    for part, begin in reversed(pieces):
        local = (*index[:d], (index[d] - begin).expand(), *index[d + 1 :])
        inside = b.index(index[d]) >= b.index(begin)
        end = b.index(index[d]) < b.index((begin + g.shape(part)[d]).expand())
        within = (local[d], g.shape(part)[d])
        with b.masked(b.call("and", inside, end), within) as mask:
            value = b.cast(b.element(part, local), g.dtype(node))
        result = value if result is None else b.where(mask, value, result)
    return result


def _pad(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    source, pads = node.args[:2]
    value = node.args[2] if len(node.args) > 2 else 0
    place, mask = list(index), b.constant(True, torch.bool)
    within = []
    for k in range(len(pads) // 2):
        d = len(index) - 1 - k
        before, after = g.size(pads[2 * k]), g.size(pads[2 * k + 1])
        place[d] = (index[d] - before).expand()
        extent = g.shape(source)[d]
        within.append((place[d], extent))
        if before != 0:
            mask = b.call("and", mask, b.index(place[d]) >= b.index(ZERO))
        if after != 0:
            mask = b.call("and", mask, b.index(place[d]) < b.index(extent))
    with b.masked(mask, *within) as inside:
        element = b.element(source, tuple(place))
    return b.where(inside, element, b.constant(value, g.dtype(node)))


def _flip(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    source, dims = node.args
    flipped = {d % len(index) for d in dims} if index else set()
    extents = g.shape(source)
    place = [extents[d] - 1 - i if d in flipped else i for d, i in enumerate(index)]
    return b.element(source, tuple(i.expand() for i in place))


def _roll(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    """Lower roll: element i comes from i - shift, cyclically; without dims the flat index is
    rolled."""
    source, shifts = node.args[:2]
    dims = node.args[2] if len(node.args) > 2 else []
    extents = g.shape(source)
    if not dims:
        flat, total = ZERO, product(extents)
        for i, extent in zip(index, extents, strict=True):
            flat = flat * extent + i
        place = _rolled(b, flat.expand(), shifts[0], total)
        found: list[Any] = []
        for extent in reversed(extents):
            place, low = b.split(place, extent)
            found.insert(0, low)
        return b.element(source, tuple(found))
    place_at = list(index)
    for shift, d in zip(shifts, dims, strict=True):
        d %= len(index)
        place_at[d] = _rolled(b, place_at[d], shift, extents[d])
    return b.element(source, tuple(place_at))


def _rolled(b: Any, i: Expr, by: Any, extent: Expr) -> Expr:
    backwards, shift = g.is_negative(by), g.size(by)
    distance = b.split(-shift if backwards else shift, extent)[1]
    start = distance if backwards else extent - distance
    return b.split((i + start).expand(), extent)[1]


def _repeat(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    source = node.args[0]
    extents = g.shape(source)
    kept = index[len(index) - len(extents) :]
    place = [b.split(i, extent)[1] for i, extent in zip(kept, extents, strict=True)]
    return b.element(source, tuple(place))


def _slice_scatter(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    """Lower slice_scatter: the second tensor inside the slice, the first one elsewhere."""
    base, piece = node.args[:2]
    d = g.argument(node, "dim") % len(index)
    extent = g.shape(base)[d]
    start, step = g.argument(node, "start"), g.size(g.argument(node, "step"))
    first = ZERO if start is None else g.size(start)
    if g.is_negative(start):
        first = (first + extent).expand()
    along, rest = b.split((index[d] - first).expand(), step)
    inside = b.index(index[d]) >= b.index(first)
    inside = b.call("and", inside, b.index(along) < b.index(g.shape(piece)[d]))
    inside = b.call("and", inside, b.call("eq", b.index(rest), b.index(ZERO)))
    with b.masked(inside, (along, g.shape(piece)[d])) as mask:
        value = b.cast(b.element(piece, (*index[:d], along, *index[d + 1 :])), g.dtype(node))
    return b.where(mask, value, b.element(base, index))


def _copy(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    """Lower copy: the second tensor, broadcast to the first one's shape and converted to its
    dtype."""
    source = node.args[1]
    extents = g.shape(source)
    kept = index[len(index) - len(extents) :]
    place = tuple(ZERO if n == 1 else i for i, n in zip(kept, extents, strict=True))
    return b.cast(b.element(source, place), g.dtype(node))


def _triangle(keep: str) -> Callable[..., Any]:
    def rule(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
        diagonal = node.args[1] if len(node.args) > 1 else 0
        kept = b.call(keep, b.index(index[-1] - index[-2]), b.index(g.size(diagonal)))
        return b.where(kept, b.element(node.args[0], index), b.constant(0, g.dtype(node)))

    return rule


indexed("aten.embedding.default", _embedding)
indexed("aten.gather.default", _gather)
indexed("aten.index_select.default", _gather)
indexed("aten.index.Tensor", _index)
indexed("aten.cat.default", _cat)
indexed("aten.constant_pad_nd.default", _pad)
indexed("aten.flip.default", _flip)
indexed("aten.roll.default", _roll)
indexed("aten.repeat.default", _repeat)
indexed("aten.slice_scatter.default", _slice_scatter)
indexed("aten.copy.default", _copy)
indexed("aten.tril.default", _triangle("le"))
indexed("aten.triu.default", _triangle("ge"))
