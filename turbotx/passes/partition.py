"""Partition: find every maximal run of non-GEMM ops between GEMMs.

In: a rewritten graph. Out: its `Region`s, each convex (no path leaves it and comes back), with
the nodes whose values others need. A node's level is the number of GEMM-like nodes on the
longest path to it; connected nodes of one level are a region, for example::

    linear -> [add, add, layer_norm] -> linear -> [add, gelu] -> linear
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from turbotx import graph as g
from turbotx.kernels.attention import attention
from turbotx.kernels.lower import Conflict, Lowered, lower
from turbotx.ops import OPS, is_computed
from turbotx.sizes import Expr
from turbotx.views import SPLITS, is_view, view_source

aten = torch.ops.aten
GEMMS = frozenset(
    {aten.linear.default, aten.mm.default, aten.bmm.default, aten.matmul.default,
     aten.addmm.default, aten.baddbmm.default}
)  # fmt: skip


@dataclass
class Region:
    """One run: its nodes in order, what it needs and gives, and the kernels it became.

    reasons: why it is more than one kernel, in words; empty for one.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    kernels: tuple[Lowered, ...] = ()
    reasons: list[str] = field(default_factory=list)

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The tensors it reads that something else made, views looked through."""
        found = dict.fromkeys(root_of(n) for m in self.nodes for n in tensor_inputs(m))
        return tuple(n for n in found if n not in set(self.nodes))


def kind_of(node: fx.Node, prepared: frozenset[fx.Node] = frozenset()) -> str:
    """Return "input", "parameter", "prepared", "view", "computed", "gemm", "attention", "extern",
    "size" or "output"."""
    if node.op in ("placeholder", "output", "get_attr"):
        return {"placeholder": "input", "output": "output", "get_attr": "parameter"}[node.op]
    if node in prepared:
        return "prepared"
    if is_view(node) or node.target in SPLITS:
        return "view"
    if node.target is attention:
        return "attention"
    if node.target in GEMMS:
        return "gemm"
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return "extern" if isinstance(value, (list, tuple)) else "size"
    return "computed" if is_computed(node) else "extern"


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if g.is_tensor(n)]


def root_of(node: fx.Node) -> fx.Node:
    """Return the node whose elements a chain of views shows."""
    while is_view(node):
        node = view_source(node)
    return node


def find_prepared(graph: fx.Graph) -> frozenset[fx.Node]:
    """Return the calls that depend on parameters alone: computed once per version of them."""
    prepared: set[fx.Node] = set()
    for node in graph.nodes:
        if not g.is_tensor(node) or node.op != "call_function" or is_view(node):
            continue
        sources = [root_of(n) for n in node.all_input_nodes]
        static = all(s.is_Integer for s in g.shape(node))
        if sources and static and all(s.op == "get_attr" or s in prepared for s in sources):
            prepared.add(node)
    return frozenset(prepared)


def partition(graph: fx.Graph, prepared: frozenset[fx.Node]) -> list[Region]:
    """Return the regions in an order in which they can run."""
    kinds = {n: kind_of(n, prepared) for n in graph.nodes}
    groups = _connect(graph, kinds)
    groups = _sink(groups, kinds)
    order = {n: k for k, n in enumerate(graph.nodes)}
    regions = []
    for nodes in groups:
        members = set(nodes)
        outputs = tuple(n for n in nodes if _leaves(n, members))
        if outputs:
            regions.append(Region("", tuple(nodes), outputs))
    regions.sort(key=lambda r: order[r.nodes[-1]])
    return regions


def _connect(graph: fx.Graph, kinds: dict[fx.Node, str]) -> list[list[fx.Node]]:
    """Group computed nodes of one level that feed each other, through views or directly."""
    level: dict[fx.Node, int] = {}
    leader: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while leader[node] is not node:
            leader[node] = leader[leader[node]]
            node = leader[node]
        return node

    for node in graph.nodes:
        below = max((level[n] for n in node.all_input_nodes), default=0)
        level[node] = below + (kinds[node] in ("gemm", "attention", "extern"))
        if kinds[node] != "computed":
            continue
        leader[node] = node
        for source in tensor_inputs(node):
            root = root_of(source)
            if kinds[root] == "computed" and level[root] == level[node]:
                leader[find(node)] = find(root)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in leader:
        groups.setdefault(find(node), []).append(node)
    order = {n: k for k, n in enumerate(graph.nodes)}
    return [sorted(nodes, key=order.__getitem__) for nodes in groups.values()]


def _sink(groups: list[list[fx.Node]], kinds: dict[fx.Node, str]) -> list[list[fx.Node]]:
    """Move a group that only one later group reads into it: its result is then never stored.

    Safe because every path out of the group leads into that reader; skipped for groups with a
    reduction, whose results are small and whose recomputation is not.
    """
    home = {n: k for k, nodes in enumerate(groups) for n in nodes}
    for k in range(len(groups)):
        nodes = groups[k]
        readers = {home.get(u, -1) for n in nodes for u in _readers(n)} - {k}
        if len(readers) != 1 or -1 in readers or any(OPS[n.target].reduces for n in nodes):
            continue
        target = readers.pop()
        groups[target] = nodes + groups[target]
        for n in nodes:
            home[n] = target
        groups[k] = []
    return [nodes for nodes in groups if nodes]


def _readers(node: fx.Node) -> list[fx.Node]:
    """Return who reads a node's elements, looking through views."""
    found: list[fx.Node] = []
    for user in node.users:
        if is_view(user) or user.target in SPLITS:
            found += _readers(user)
        else:
            found.append(user)
    return found


def _leaves(node: fx.Node, members: set[fx.Node]) -> bool:
    return any(u not in members for u in _readers(node))


# --- from region to kernels -----------------------------------------------------------------


def lower_region(region: Region) -> None:
    """Give the region its kernels: one where possible, otherwise the fewest, with the reasons."""
    members = set(region.nodes)
    stored: set[fx.Node] = set()

    def loaded(node: fx.Node) -> bool:
        return node in stored or (not is_view(node) and node not in members)

    def attempt(outputs: list[fx.Node]) -> Lowered:
        inside = set(outputs)
        name = name_kernel(outputs, members, stored)
        return lower(outputs, lambda n: n not in inside and loaded(n), name, ())

    groups: list[tuple[list[fx.Node], Lowered]] = []

    def place(node: fx.Node) -> None:
        if node in stored:
            return
        if groups:
            outputs = [*groups[-1][0], node]
            before = set(stored)
            stored.difference_update(groups[-1][0])
            try:
                groups[-1] = (outputs, attempt(outputs))
                stored.update(outputs)
                return
            except Conflict as conflict:
                stored.update(before)
                first_reason = str(conflict)
        while True:
            try:
                lowered = attempt([node])
                break
            except Conflict as conflict:
                if conflict.node is node:
                    raise
                _note(region, str(conflict))
                place(conflict.node)
        if groups:
            _note(region, first_reason if not region.reasons else region.reasons[-1])
        groups.append(([node], lowered))
        stored.add(node)

    for output in region.outputs:
        place(output)
    region.kernels = tuple(lowered for _, lowered in groups)


def _note(region: Region, reason: str) -> None:
    if reason not in region.reasons:
        region.reasons.append(reason)


def name_kernel(outputs: list[fx.Node], members: set[fx.Node], stored: set[fx.Node]) -> str:
    """Return `fused_` and the ops that this kernel computes, in order, the last four of them."""
    seen: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        root = root_of(node)
        if root in seen or root not in members or (root in stored and root not in outputs):
            return
        for source in tensor_inputs(root):
            visit(source)
        seen[root] = None

    for output in outputs:
        visit(output)
    names = [op_name(n) for n in seen]
    short = [n for k, n in enumerate(names) if k == 0 or n != names[k - 1]]
    return "_".join(["fused", *short[-4:]])


def op_name(node: fx.Node) -> str:
    """Return the plain name of a call: layer_norm for aten.layer_norm.default."""
    target: Any = node.target
    name = getattr(target, "overloadpacket", target)
    return getattr(name, "__name__", str(name)).strip("_")


def extents_of(node: fx.Node) -> tuple[Expr, ...]:
    return g.shape(node)
