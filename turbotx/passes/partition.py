"""Partition: finds every maximal region of non-GEMM ops between GEMMs.

In: a rewritten graph. Out: its `Region`s, each convex (no path leaves it and returns), with the
nodes whose values are used outside. A node's level is the number of GEMM-like nodes on the longest
path to it; connected nodes of one level form a region, which is cut where a path in it gets longer
than MOST_DEEP. For example::

    linear -> [add, add, layer_norm] -> linear -> [add, gelu] -> linear
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from turbotx.capture.result_layouts import OWN
from turbotx.ir import fx_nodes as g
from turbotx.ir.attention_ops import attention, attention_scores, attention_values
from turbotx.ir.cache_ops import cache_store
from turbotx.ir.expert_ops import grouped_linear, route
from turbotx.ir.packed_ops import packed_attention
from turbotx.ir.quantized_ops import QUANTIZED_LINEARS
from turbotx.ir.views import SPLITS, is_view, view_source
from turbotx.ops import OPS, is_computed

aten = torch.ops.aten
GEMMS = frozenset(
    {aten.linear.default, aten.mm.default, aten.bmm.default, aten.matmul.default,
     aten.addmm.default, aten.baddbmm.default, grouped_linear, *QUANTIZED_LINEARS}
)  # fmt: skip

_KINDS: dict[Any, str] = {
    attention: "attention", packed_attention: "attention", attention_scores: "product",
    attention_values: "product", route: "route", cache_store: "store",
    **dict.fromkeys(GEMMS, "gemm"),
}  # fmt: skip

BEGINS = "begins"
"""Meta key of a node that must start a region: its inputs are in other regions."""

MOST_DEEP = 100
"""Nodes on a path within a region: lowering goes down such a path by some five calls a node, of the
1,000 that Python allows. So many ops between a load and a store hide both."""

_OPS = {"placeholder": "input", "output": "output", "get_attr": "parameter"}
_APART = ("gemm", "attention", "product", "route", "store", "extern")
"""The kinds of nodes outside of regions."""


@dataclass
class Region:
    """One region: its nodes in order, and those whose values are used outside."""

    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The tensors it reads from outside, through views."""
        found = dict.fromkeys(root_of(n) for m in self.nodes for n in tensor_inputs(m))
        return tuple(n for n in found if n not in set(self.nodes))

    @property
    def needs(self) -> tuple[fx.Node, ...]:
        """Every node outside that it depends on, including views and sizes, nearest first."""
        found = dict.fromkeys(n for m in self.nodes for n in m.all_input_nodes)
        inside = set(self.nodes)
        return tuple(root_of(n) if root_of(n) not in inside else n for n in found
                     if n not in inside and root_of(n) not in inside)  # fmt: skip


def kind_of(node: fx.Node, hoisted: frozenset[fx.Node] = frozenset()) -> str:
    """Return the kind of a node: "input", "parameter", "hoisted", "view", "computed", "gemm",
    "attention", "product" (one of attention's two), "route" (rows to experts), "store" (rows in a
    cache), "extern", "piece" (one of several results), "size" or "output"."""
    if node.op in _OPS:
        return _OPS[node.op]
    if node in hoisted:
        return "hoisted"
    if is_view(node) or node.target in SPLITS:
        return "view"
    if node.target in _KINDS:
        return _KINDS[node.target]
    value = node.meta.get("val")
    if node.target is g.GETITEM and isinstance(value, torch.Tensor):
        return "piece"
    if not isinstance(value, torch.Tensor):
        return "extern" if isinstance(value, (list, tuple)) else "size"
    return "computed" if is_computed(node) and not _is_about_nothing(node) else "extern"


def _is_about_nothing(node: fx.Node) -> bool:
    """Return whether a tensor of a call is empty at all sizes. PyTorch handles that and raises
    errors if needed; a kernel would divide by its extents."""
    return any(0 in g.shape(n) for n in (node, *tensor_inputs(node)))


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the tensors among a node's inputs, without duplicates."""
    return [n for n in node.all_input_nodes if g.is_tensor(n)]


def root_of(node: fx.Node) -> fx.Node:
    """Return the node at the root of a chain of views."""
    while is_view(node):
        node = view_source(node)
    return node


def find_hoisted(graph: fx.Graph) -> frozenset[fx.Node]:
    """Return the calls that depend on parameters alone, which are computed once per parameter
    version."""
    hoisted: set[fx.Node] = set()
    for node in graph.nodes:
        if not g.is_tensor(node) or node.op != "call_function" or is_view(node):
            continue
        sources = [root_of(n) for n in node.all_input_nodes]
        if g.is_random(node) or OWN in node.meta:
            continue
        if not all(s.is_Integer for s in g.shape(node)) or _reads_sizes(node):
            continue
        if sources and all(s.op == "get_attr" or s in hoisted for s in sources):
            hoisted.add(node)
    return frozenset(hoisted)


def _reads_sizes(node: fx.Node) -> bool:
    """Return whether a call, or a view it reads through, depends on the sizes of the inputs."""
    for source in node.all_input_nodes:
        if isinstance(source.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return True
        if (is_view(source) or source.target in SPLITS) and _reads_sizes(source):
            return True
    return False


def partition(graph: fx.Graph, hoisted: frozenset[fx.Node]) -> list[Region]:
    """Return the regions in an executable order."""
    kinds = {n: kind_of(n, hoisted) for n in graph.nodes}
    places = find_places(kinds)
    groups = _sink(_connect(graph, kinds, places), places)
    order = {n: k for k, n in enumerate(graph.nodes)}
    regions = []
    for nodes in groups:
        members = set(nodes)
        outputs = tuple(n for n in nodes if _leaves(n, members))
        if outputs:
            regions.append(Region(tuple(nodes), outputs))
    regions.sort(key=lambda r: order[r.nodes[-1]])
    return regions


class Place(NamedTuple):
    """Where a node is: its level, and the nodes of that level on the longest path to it."""

    level: int
    depth: int


def find_places(kinds: Mapping[fx.Node, str]) -> dict[fx.Node, Place]:
    """Return each node's place. Its level is the number of calls on the longest path to it that no
    kernel computes, and of cuts of what gets too deep.

    `kinds` holds every node of the graph, in order. A random draw counts as reading the previous
    one, so that no region would have to run both after the later and before the earlier draw.
    """
    places: dict[fx.Node, Place] = {}
    drawn = Place(0, 0)
    for node, kind in kinds.items():
        random = g.is_random(node)
        below = max((places[n] for n in node.all_input_nodes), default=Place(0, 0))
        below = max(below, Place(drawn.level, 0)) if random else below
        if kind in _APART:
            place = Place(below.level + 1, 0)
        elif kind == "computed" and below.depth >= MOST_DEEP:
            place = Place(below.level + 1, 1)
        else:
            place = Place(below.level, below.depth + (kind in ("computed", "view")))
        places[node] = place
        drawn = place if random else drawn
    return places


def _connect(
    graph: fx.Graph, kinds: Mapping[fx.Node, str], places: Mapping[fx.Node, Place]
) -> list[list[fx.Node]]:
    """Group computed nodes of one level that are connected, directly or through views."""
    leader: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while leader[node] is not node:
            leader[node] = leader[leader[node]]
            node = leader[node]
        return node

    for node in graph.nodes:
        if kinds[node] != "computed":
            continue
        leader[node] = node
        for source in tensor_inputs(node):
            root = root_of(source)
            begins = BEGINS in node.meta and BEGINS not in root.meta
            alike = kinds[root] == "computed" and places[root].level == places[node].level
            if alike and not begins:
                leader[find(node)] = find(root)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in leader:
        groups.setdefault(find(node), []).append(node)
    order = {n: k for k, n in enumerate(graph.nodes)}
    return [sorted(nodes, key=order.__getitem__) for nodes in groups.values()]


def _sink(groups: list[list[fx.Node]], places: Mapping[fx.Node, Place]) -> list[list[fx.Node]]:
    """Merge a group into its only reader if that is one later group: its result is then never
    stored.

    Safe because every path out of the group leads to that reader. Groups with a reduction are
    skipped: their results are small and expensive to recompute. So is what would get too deep.
    """
    home = {n: k for k, nodes in enumerate(groups) for n in nodes}
    depths = [max(places[n].depth for n in nodes) for nodes in groups]
    for k in range(len(groups)):
        nodes = groups[k]
        readers = {home.get(u, -1) for n in nodes for u in _readers(n)} - {k}
        if len(readers) != 1 or -1 in readers or any(OPS[n.target].reduces for n in nodes):
            continue
        target = readers.pop()
        depth = depths[k] + depths[target]
        if BEGINS in groups[target][0].meta or depth > MOST_DEEP:
            continue
        groups[target], depths[target] = nodes + groups[target], depth
        for n in nodes:
            home[n] = target
        groups[k] = []
    return [nodes for nodes in groups if nodes]


def _readers(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that read a node's elements, through views; size reads do not count."""
    found: list[fx.Node] = []
    for user in node.users:
        if g.is_size(user):
            continue
        if is_view(user) or user.target in SPLITS:
            found += _readers(user)
        else:
            found.append(user)
    return found


def _leaves(node: fx.Node, members: set[fx.Node]) -> bool:
    return any(u not in members for u in _readers(node))


def op_name(node: fx.Node) -> str:
    """Return the short name of a call: layer_norm for aten.layer_norm.default."""
    target: Any = node.target
    name = getattr(target, "overloadpacket", target)
    return getattr(name, "__name__", str(name)).strip("_")
