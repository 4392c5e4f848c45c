"""Extract: a part of a graph as a module of its own, with the ATen calls as they are.

In: the nodes to compute and the tensors that are given. Out: a GraphModule of (tensors, sizes) ->
tensors: what a kernel means, run by PyTorch, and what the fused graph shows inside a region::

    extract([layer_norm], [linear, bias, x, ...])  ->  GraphModule: add, add, layer_norm
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from turbotx import graph as g
from turbotx.sizes import Expr


@dataclass(frozen=True)
class Extracted:
    """module(*tensors, *sizes) returns a tuple; `sizes` are what the size nodes stand for."""

    module: fx.GraphModule
    size_nodes: tuple[fx.Node, ...]
    sizes: tuple[Expr, ...]


def extract(outputs: Sequence[fx.Node], inputs: Sequence[fx.Node], name: str) -> Extracted:
    """Copy what `outputs` need down to `inputs`; size nodes become arguments after the tensors."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        made[node] = graph.placeholder(node.name)
        made[node].meta = dict(node.meta)
    sizes: dict[fx.Node, fx.Node] = {}
    needed = _order(outputs, set(inputs))
    for node in needed:
        if not _is_tensor_like(node):
            sizes[node] = made[node] = graph.placeholder(node.name)
    for node in needed:
        if node not in made:
            made[node] = copied = graph.node_copy(node, made.__getitem__)
            if copied.target is torch.ops.aten.view.default:  # what it shows may not be dense here
                copied.target = torch.ops.aten.reshape.default
    graph.output(tuple(made[n] for n in outputs))
    module = fx.GraphModule(nn.Module(), graph, class_name=name)
    return Extracted(module, tuple(sizes), tuple(g.size(n) for n in sizes))


def _is_tensor_like(node: fx.Node) -> bool:
    return g.is_tensor(node) or isinstance(node.meta.get("val"), (list, tuple))


def _order(outputs: Sequence[fx.Node], given: set[fx.Node]) -> list[fx.Node]:
    found: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if node in found or (node in given and node not in outputs):
            return
        if _is_tensor_like(node):
            for source in node.all_input_nodes:
                visit(source)
        found[node] = None

    for node in outputs:
        visit(node)
    return list(found)
