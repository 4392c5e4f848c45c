"""The fused graph: the rewritten model as an ordinary torch.fx.GraphModule.

In: a `Compiled`. Out: a GraphModule with one `call_module` per region, whose submodule holds the
region's ATen ops, between GEMMs and attention. It prints, draws and runs::

    linear -> fused_add_gelu_1 -> linear -> fused_add_layer_norm_3 -> ...
"""

from __future__ import annotations

import re
from typing import Any

from torch import fx

from turbotx.engine.compiled import Compiled
from turbotx.ir import fx_nodes as g
from turbotx.kernels.fusion.fuse import FusedRegion
from turbotx.passes.extract import extract


def make_fused_graph(compiled: Compiled) -> fx.GraphModule:
    """Return the rewritten graph with one `call_module` per region.

    Its forward takes the captured tensors in order and returns the output's leaves as a list.
    meta["rewritten"] of every other node is the name that the node had before regions were grouped.
    """
    graph = compiled.captured.graph_module.graph
    builder = _Builder(compiled)
    for node in graph.nodes:
        builder.ensure(node)
    builder.graph.eliminate_dead_code(lambda node: node.op in ("output", "placeholder"))
    return fx.GraphModule(builder.root, builder.graph, class_name=compiled.captured.name)


class _Builder:
    """Builds the graph; `root` maps its targets to parameters and region submodules."""

    def __init__(self, compiled: Compiled) -> None:
        self.source = compiled.captured.graph_module
        self.graph = fx.Graph()
        self.root: dict[str, Any] = {}
        self.region_of = {n: f for f in compiled.fused for n in f.region.nodes}
        self.made: dict[fx.Node, fx.Node] = {}
        self.names: dict[str, int] = {}
        # Placeholders keep their order, whichever is needed first.
        for node in self.source.graph.find_nodes(op="placeholder"):
            self._copy(node)

    def ensure(self, node: fx.Node) -> None:
        """Add `node`, or the region that contains it, after everything it needs."""
        if node in self.made:
            return
        fused = self.region_of.get(node)
        if fused is not None:
            self._region(fused)
            return
        for needed in node.all_input_nodes:
            self.ensure(needed)
        self._copy(node)

    def _copy(self, node: fx.Node) -> None:
        copied = self.graph.node_copy(node, self.made.__getitem__)
        copied.meta["rewritten"] = node.name
        self.made[node] = copied
        if node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            self.root[str(node.target)] = getattr(self.source.get_submodule(owner), leaf)

    def _region(self, fused: FusedRegion) -> None:
        region = fused.region
        extracted = extract(region.outputs, region.inputs, fused.name)
        given = (*region.inputs, *extracted.size_nodes)
        for needed in given:
            self.ensure(needed)
        k = self.names.get(fused.name, 0)
        self.names[fused.name] = k + 1
        name = f"{fused.name}_{k}"
        self.root[name] = extracted.module
        args = tuple(self.made[n] for n in given)
        call = self.graph.create_node("call_module", name, args, name=name)
        call.meta["val"] = tuple(n.meta["val"] for n in region.outputs)
        call.meta["kernels"] = [k.kernel.name for k in fused.kernels]
        for k, output in enumerate(region.outputs):
            piece = self.graph.call_function(g.GETITEM, (call, k))
            piece.meta = {**output.meta, "rewritten": output.name}
            self.made[output] = piece
        for node in region.nodes:
            self.made.setdefault(node, call)


def readable(graph: fx.Graph) -> str:
    """Return a graph as text, one call per line, without types."""
    return re.sub(r"\[num_users=\d+\]", "", str(graph))
