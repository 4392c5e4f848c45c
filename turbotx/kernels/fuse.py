"""Fuse: a region becomes one kernel, or the fewest that it needs, with the reasons in words.

In: a `Region`. Out: its `FusedRegion`: kernels in the order they run. All outputs are tried as
one kernel; where a reduction runs over other axes than the rest, its input is cut there::

    layer_norm(x).sum(dim=1)  ->  2 kernels: "layer_norm reduces over another axis ..."
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from turbotx.kernels.lower import Lowered, lower
from turbotx.loops import Conflict
from turbotx.passes.partition import Region, find_levels, kind_of, op_name, root_of, tensor_inputs
from turbotx.sizes import Expr
from turbotx.views import is_view


@dataclass
class FusedRegion:
    """A region, its kernels, and why it took more than one of them."""

    region: Region
    kernels: tuple[Lowered, ...] = ()
    reasons: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.kernels[-1].kernel.name if self.kernels else "fused"


def fuse(region: Region) -> FusedRegion:
    """Give the region its kernels: one where possible, otherwise the fewest, with the reasons."""
    fused = FusedRegion(region)
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
                _note(fused, str(conflict))
                place(conflict.node)
        if groups:
            _note(fused, first_reason if not fused.reasons else fused.reasons[-1])
        groups.append(([node], lowered))
        stored.add(node)

    for output in region.outputs:
        place(output)
    fused.kernels = tuple(lowered for _, lowered in groups)
    return fused


def fuse_all(
    graph: fx.Graph, regions: Sequence[Region], prepared: frozenset[fx.Node]
) -> list[FusedRegion]:
    """Fuse every region; neighbours that do the same to other parts of one tensor become one.

    Rotary embedding of queries and of keys, say: two regions of one level that read a common
    tensor over the same axes. One kernel reads what they share once, and is one launch.
    """
    level = _levels(graph, prepared)
    done: list[FusedRegion] = []
    for region in regions:
        fused = fuse(region)
        for k, other in enumerate(done):
            if _may_merge(fused, other, level):
                merged = fuse(_union(other.region, region, level))
                if len(merged.kernels) == 1 and _loops(merged) == _loops(fused):
                    done[k] = merged
                    break
        else:
            done.append(fused)
    return done


def _levels(graph: fx.Graph, prepared: frozenset[fx.Node]) -> dict[fx.Node, tuple[int, int]]:
    """Return how many calls that no kernel computes lie before each node, and its place.

    What one region needs of another always lies at a lower level, so regions of one level are
    free of each other, whatever is merged.
    """
    level = find_levels({n: kind_of(n, prepared) for n in graph.nodes})
    return {n: (level[n], place) for place, n in enumerate(graph.nodes)}


def _may_merge(a: FusedRegion, b: FusedRegion, level: Mapping[fx.Node, tuple[int, int]]) -> bool:
    if len(a.kernels) != 1 or len(b.kernels) != 1 or _loops(a) != _loops(b):
        return False
    if max(level[n][0] for n in a.region.nodes) != max(level[n][0] for n in b.region.nodes):
        return False
    shared = set(a.region.inputs) & set(b.region.inputs)
    return any(n.op != "get_attr" for n in shared)


def _loops(fused: FusedRegion) -> list[tuple[Expr, str]]:
    return [(axis.extent, axis.kind) for axis in fused.kernels[0].kernel.axes]


def _union(a: Region, b: Region, level: Mapping[fx.Node, tuple[int, int]]) -> Region:
    nodes = sorted({*a.nodes, *b.nodes}, key=lambda n: level[n][1])
    outputs = sorted({*a.outputs, *b.outputs}, key=lambda n: level[n][1])
    return Region(tuple(nodes), tuple(outputs))


def _note(fused: FusedRegion, reason: str) -> None:
    if reason not in fused.reasons:
        fused.reasons.append(reason)


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
