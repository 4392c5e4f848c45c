"""Outputs: gives every output eager's strides, and memory that the caller owns.

In: a rewritten graph whose output node records what eager returns (`capture.result_layouts`). Out:
the same graph with a copy of each leaf that is laid out differently, because its product was packed
with others, because it depends on parameters alone, or because equal calls were merged::

    return slice(packed, 2, 0, 8)  ->  return clone(slice(packed, 2, 0, 8))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from turbotx.capture.result_layouts import OWN, RETURNS, Fresh, are_equal_strides, order_of
from turbotx.ir import fx_nodes as g
from turbotx.ir.strides import layout_with_copies
from turbotx.passes.partition import find_hoisted, kind_of

aten = torch.ops.aten


def own_outputs(graph: fx.Graph) -> None:
    """Copy leaves that are not laid out as in eager, if a dense copy of the leaf alone suffices."""
    (output,) = graph.find_nodes(op="output")
    hoisted = find_hoisted(graph)
    copied = copied_leaves(output, {n: kind_of(n, hoisted) for n in graph.nodes})
    leaves = list(output.args[0])
    views = Counter(r.memory for r in output.meta.get(RETURNS, ()) if isinstance(r, Fresh))
    for k, fresh in copied.items():
        order = order_of(fresh.shape, fresh.strides)
        if order is None or views[fresh.memory] > 1:
            continue  # `assemble` copies it into memory like eager's
        with graph.inserting_before(output):
            leaves[k] = _copy(leaves[k], order)
    output.args = (type(output.args[0])(leaves),)


def _copy(leaf: fx.Node, order: list[int]) -> fx.Node:
    """Return a copy that is contiguous with the leaf's dims in this order, slowest first."""
    plain = order == list(range(len(order)))
    source = leaf if plain else g.emit(leaf, aten.permute.default, leaf, order)
    memory = {"memory_format": torch.contiguous_format}
    copied = g.emit(leaf, aten.clone.default, source, **memory)
    copied.meta[OWN] = True
    back = [order.index(d) for d in range(len(order))]
    return copied if plain else g.emit(leaf, aten.permute.default, copied, back)


def copied_leaves(output: fx.Node, kinds: Mapping[fx.Node, str]) -> dict[int, Fresh]:
    """Return, by index, the leaves that are not in their own memory with eager's layout.

    kinds: of every node, as returned by `partition.kind_of`.
    """
    leaves: Any = output.args[0]
    fresh = {k: r for k, r in enumerate(output.meta.get(RETURNS, ())) if isinstance(r, Fresh)}
    views = Counter(r.memory for r in fresh.values())
    owners: dict[fx.Node, str] = {}
    others: set[str] = set()
    for k, returned in fresh.items():
        layout = layout_with_copies(leaves[k])
        made = kinds[layout.root] not in ("input", "parameter", "hoisted")
        alone = owners.setdefault(layout.root, returned.memory) == returned.memory
        same = are_equal_strides(returned.shape, layout.strides, returned.strides)
        # A window's offset matters only if other windows on the same memory are returned.
        placed = views[returned.memory] == 1 or (layout.offset - returned.offset).expand() == 0
        if not (made and alone and same and placed):
            others.add(returned.memory)
    return {k: f for k, f in fresh.items() if f.memory in others}
