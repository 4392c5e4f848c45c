"""Extract: copies a part of a graph into an fx module of its own.

In: the nodes to compute and the given tensors. Out: a GraphModule that maps (tensors, sizes) to
tensors: the PyTorch equivalent of a kernel, and the submodule of a region in the fused graph::

    extract([layer_norm], [linear, bias, x, ...])  ->  GraphModule: add, add, layer_norm
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from turbotx.capture.light_export import late_code
from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import Expr

aten = torch.ops.aten
# Ops that use only the shape of their first argument, and the value they fill with (None: given by
# an argument).
SHAPED_AS: dict[Any, int | None] = {
    aten.zeros_like.default: 0, aten.new_zeros.default: 0, aten.ones_like.default: 1,
    aten.new_ones.default: 1, aten.full_like.default: None, aten.new_full.default: None,
}  # fmt: skip


@dataclass(frozen=True)
class Extracted:
    """module(*tensors, *sizes) returns a tuple; `sizes` are the values of the size nodes, followed
    by extents needed to create tensors shaped like one that is not given."""

    module: fx.GraphModule
    size_nodes: tuple[fx.Node, ...]
    sizes: tuple[Expr, ...]


def extract(outputs: Sequence[fx.Node], inputs: Sequence[fx.Node], name: str) -> Extracted:
    """Copy what `outputs` depend on, down to `inputs`; size nodes become arguments after the
    tensors.

    Tensors outside the inputs of which only the shape is used (zeros_like) are not copied, as in a
    kernel: their sizes become arguments.
    """
    return _Extractor(outputs, inputs).run(name)


class _Extractor:
    def __init__(self, outputs: Sequence[fx.Node], inputs: Sequence[fx.Node]) -> None:
        self.outputs, self.given = outputs, set(inputs)
        self.graph = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        for node in inputs:
            self.made[node] = self.graph.placeholder(node.name)
            self.made[node].meta = dict(node.meta)

    def run(self, name: str) -> Extracted:
        needed = self._order()
        sizes: dict[fx.Node, fx.Node] = {}
        for node in needed:
            if not _is_tensor_like(node):
                sizes[node] = self.made[node] = self.graph.placeholder(node.name)
        shapes = [g.shape(n) for n in needed if self._only_shaped(n)]
        extents = [e for e in dict.fromkeys(e for s in shapes for e in s) if not e.is_Integer]
        places = {e: self.graph.placeholder(f"extent_{k}") for k, e in enumerate(extents)}
        for node in needed:
            if self._only_shaped(node):
                self.made[node] = self._create(node, places)
            elif node not in self.made:
                self.made[node] = copied = self.graph.node_copy(node, self.made.__getitem__)
                if copied.target is aten.view.default:  # its source may not be contiguous here
                    copied.target = aten.reshape.default
        self.graph.output(tuple(self.made[n] for n in self.outputs))
        with late_code():  # it is mostly never called
            module = fx.GraphModule(nn.Module(), self.graph, class_name=name)
        return Extracted(module, tuple(sizes), (*(g.size(n) for n in sizes), *extents))

    def _create(self, node: fx.Node, places: Mapping[Expr, fx.Node]) -> fx.Node:
        """Create a tensor from its shape, without the tensor that it is shaped like."""
        value, shape = node.meta["val"], g.shape(node)
        fill: Any = SHAPED_AS.get(node.target, 0)
        if fill is None:
            fill = g.argument(node, "fill_value")
            fill = self.made[fill] if isinstance(fill, fx.Node) else fill
        extents = [int(e) if e.is_Integer else places[e] for e in shape]
        made = self.graph.call_function(
            aten.full.default, (extents, fill), {"dtype": value.dtype, "device": value.device}
        )
        made.meta = dict(node.meta)
        return made

    def _only_shaped(self, node: fx.Node) -> bool:
        """Return whether only the shape of a node (or of its argument) matters: a kernel is given
        every tensor whose elements it reads."""
        if node in self.given:
            return False
        if node.op in ("placeholder", "get_attr"):
            return True
        return node.target in SHAPED_AS and not self._is_reached(g.operand(node, 0))

    def _is_reached(self, node: fx.Node) -> bool:
        """Return whether a tensor is computed from the given ones."""
        if node in self.given:
            return True
        if node.op != "call_function" or node.target in SHAPED_AS:
            return node.target in SHAPED_AS
        return all(self._is_reached(n) for n in node.all_input_nodes if _is_tensor_like(n))

    def _order(self) -> list[fx.Node]:
        found: dict[fx.Node, None] = {}

        def visit(node: fx.Node) -> None:
            if node in found or (node in self.given and node not in self.outputs):
                return
            if self._only_shaped(node):
                for source in node.all_input_nodes:
                    if not _is_tensor_like(source):
                        visit(source)
            elif _is_tensor_like(node):
                for source in node.all_input_nodes:
                    visit(source)
            found[node] = None

        for node in self.outputs:
            visit(node)
        return list(found)


def _is_tensor_like(node: fx.Node) -> bool:
    return g.is_tensor(node) or isinstance(node.meta.get("val"), (list, tuple))
