"""Rising: simplifies masks that compare positions known to increase by one.

In: a graph whose mask detects packed sequences from positions, as transformers' decoders do: a new
sequence begins where neighbours do not differ by one. Out: if the positions are provably 0, 1, 2,
..., the mask without that term, and without its (seq, seq) tensor::

    (cumsum(diff(arange(n)) != 1)[q] == cumsum(...)[k]) & (k <= q)  ->  k <= q
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.passes.known_values import find_number

aten = torch.ops.aten
_ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_ANDS = (aten.bitwise_and.Tensor, aten.logical_and.default)


def drop_packed_sequences(graph: fx.Graph) -> None:
    """Remove terms of conjunctions that are true because positions increase by one."""
    known: dict[fx.Node, Any] = {}
    for node in list(graph.nodes):
        if g.is_call(node, aten.sub.Tensor) and _is_difference_of_rising(node):
            known[node] = 1
        elif not known:
            continue
        elif g.is_call(node, aten.cumsum.default) and find_number(node.args[0], known) == 0:
            known[node] = 0
        elif g.is_call(node, *_ANDS) and g.dtype(node) is torch.bool:
            left, right = (g.operand(node, k) for k in (0, 1))
            for one, other in ((left, right), (right, left)):
                if find_number(one, known) is True and _is_alike(other, node):
                    g.replace(node, other)
                    break


def _is_alike(one: fx.Node, other: fx.Node) -> bool:
    return g.shape(one) == g.shape(other) and g.dtype(one) is g.dtype(other)


def _is_difference_of_rising(node: fx.Node) -> bool:
    """Return whether a node is `torch.diff` of positions increasing by one along its dim, with the
    first position minus one prepended."""
    if node.kwargs or not all(g.is_call(n, aten.slice.Tensor) for n in node.args):
        return False
    later, earlier = (g.operand(node, k) for k in (0, 1))
    joined = g.operand(later, 0)
    if not g.is_call(joined, aten.cat.default) or earlier.args[0] is not joined:
        return False
    parts: Any = joined.args[0]
    rank = len(g.shape(node))
    dim = g.argument(joined, "dim", 0) % rank
    if len(parts) != 2 or not (_begins(later, dim, 1) and _begins(earlier, dim, 0)):
        return False
    before, places = parts
    sizes = {g.shape(n) for n in (later, earlier, places)}
    return len(sizes) == 1 and _rising_dim(places) == dim - rank and _precedes(before, places, dim)


def _begins(node: fx.Node, dim: int, start: int) -> bool:
    """Return whether a slice takes all elements along a dim from index `start` on."""
    along = g.argument(node, "dim", 0) % len(g.shape(node))
    begin = g.argument(node, "start") or 0
    return bool(along == dim and begin == start and g.argument(node, "step", 1) == 1)


def _precedes(before: Any, places: Any, dim: int) -> bool:
    """Return whether `before` is one less than the first of `places` along a dim."""
    if not g.is_call(before, aten.sub.Tensor) or before.kwargs or before.args[1] != 1:
        return False
    first = before.args[0]
    if not g.is_call(first, aten.slice.Tensor):
        return False
    source: Any = first.args[0]
    if _without_whole_slices(source) is not _without_whole_slices(places):
        return False
    return _begins(first, dim, 0) and g.shape(first)[dim] == 1


def _without_whole_slices(node: fx.Node) -> fx.Node:
    """Return what slices that take everything (`x[:]`) are taken of."""
    while g.is_call(node, aten.slice.Tensor):
        source = g.operand(node, 0)
        if g.argument(node, "step", 1) != 1 or g.shape(node) != g.shape(source):
            break
        node = source
    return node


def _rising_dim(node: Any) -> int | None:
    """Return the dim (negative) along which an integer tensor increases by one; None for other
    tensors."""
    if not g.is_tensor(node) or node.op != "call_function" or g.dtype(node).is_floating_point:
        return None
    node = _without_whole_slices(node)
    if node.target in _ARANGES:
        is_by_one = node.target is not aten.arange.start_step or g.argument(node, "step", 1) == 1
        return -1 if is_by_one else None
    if g.is_call(node, aten.add.Tensor, aten.sub.Tensor):
        is_moved = not node.kwargs and not g.is_tensor(node.args[1])
        return _rising_dim(node.args[0]) if is_moved else None
    if g.is_call(node, aten.expand.default):
        source: Any = node.args[0]
        along = _rising_dim(source)
        stays = along is not None and g.shape(source)[along] == g.shape(node)[along]
        return along if stays else None
    if g.is_call(node, aten.unsqueeze.default):
        along, rank = _rising_dim(node.args[0]), len(g.shape(node))
        if along is None:
            return None
        return along - (node.args[1] % rank > rank - 1 + along)
    return None
