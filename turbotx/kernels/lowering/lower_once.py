"""Lower once: a cache of lowered kernels, so that equal layers are lowered only once.

In and out: as `lower`. Nodes with the same ops on tensors of equal dtypes, shapes and strides share
one kernel, with their own operands::

    known = LowerOnce()
    first, second = (known.lower([n], loaded, name, lines) for n in (add_1, add_2))
    first.kernel is second.kernel
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import expr
from turbotx.ir.strides import root_layout
from turbotx.kernels.lowering.lower import Lowered, lower
from turbotx.ops.scalarizer import param_base


class LowerOnce:
    """The kernels lowered so far of one graph, which must not change."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Lowered, tuple[int, ...]]] = {}

    def lower(
        self, outputs: Sequence[fx.Node], loaded: Callable[[fx.Node], bool], name: str,
        sources: Sequence[str], as_stored: Collection[fx.Node] = (),
    ) -> Lowered:  # fmt: skip
        """Return what `lower` returns, from the cache if possible."""
        walk = _Walk(loaded, frozenset(outputs), as_stored)
        key = (name, tuple(sources), tuple(map(walk.visit, outputs)), tuple(walk.described))
        known = self._known.get(key)
        if known is None:
            lowered = lower(outputs, loaded, name, sources, as_stored)
            self._known[key] = lowered, tuple(walk.places[n] for n in lowered.operands)
            return lowered
        lowered, places = known
        nodes = list(walk.places)
        return replace(lowered, operands=tuple(nodes[k] for k in places))


class _Walk:
    """Describes everything that lowering reads of nodes, from the outputs to the loaded nodes."""

    def __init__(
        self, loaded: Callable[[fx.Node], bool], outputs: frozenset[fx.Node],
        as_stored: Collection[fx.Node],
    ) -> None:  # fmt: skip
        self._loaded, self._outputs, self._as_stored = loaded, outputs, as_stored
        self.places: dict[fx.Node, int] = {}
        self.described: list[Any] = []

    def visit(self, node: fx.Node) -> int:
        """Describe a node and its inputs; return its index in `described`."""
        if node not in self.places:
            self.places[node] = k = len(self.places)
            self.described.append(None)
            self.described[k] = self._describe(node)
        return self.places[node]

    def _describe(self, node: fx.Node) -> Any:
        if g.is_tensor(node) and self._loaded(node):
            layout = root_layout(node)
            return g.dtype(node), layout.shape, layout.strides, layout.offset, param_base(node)
        value = node.meta.get("val")
        if isinstance(value, (int, torch.SymInt)):
            return type(value), expr(value)
        if node.op != "call_function":
            return node
        for read in node.all_input_nodes:
            self.visit(read)
        args, kwargs = (g.freeze(x, self.places.__getitem__) for x in (node.args, node.kwargs))
        if isinstance(value, torch.Tensor):
            made: Any = g.dtype(node), g.shape(node)
        else:  # the pieces of a split; a float
            made = tuple(map(g.sizes_of, value)) if isinstance(value, (list, tuple)) else None
        stored = param_base(node) if node in self._outputs else None
        return node.target, args, kwargs, made, stored, node in self._as_stored
