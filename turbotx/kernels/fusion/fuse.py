"""Fuse: turns a region into one kernel, or as few as possible, and records why it was split.

In: a `Region`. Out: its `FusedRegion`: kernels in execution order. Every output is tried in the
existing kernels; if a reduction runs over other axes than the rest, the region is split at its
input::

    layer_norm(x).sum(dim=1)  ->  2 kernels: "layer_norm reduces over another axis ..."
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.views import is_view
from turbotx.kernels.fusion.cost import Choice, compare_nbytes, moved_nbytes
from turbotx.kernels.fusion.horizontal_fusion import fuse_horizontally
from turbotx.kernels.fusion.sources import describe_sources, find_computed, name_kernel
from turbotx.kernels.lowering.lower import Lowered
from turbotx.kernels.lowering.lower_once import LowerOnce
from turbotx.ops import OPS
from turbotx.ops.builder import HALVES
from turbotx.ops.loop_nest import FusionConflict
from turbotx.passes.partition import Region, find_places, kind_of, root_of, tensor_inputs


@dataclass
class FusedRegion:
    """A region and its kernels. reasons: why it needed more than one. choices: which values with
    several readers are stored, and which are recomputed."""

    region: Region
    kernels: tuple[Lowered, ...] = ()
    reasons: list[str] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of its last kernel, "fused" if it has none."""
        return self.kernels[-1].kernel.name if self.kernels else "fused"


def fuse(region: Region, known: LowerOnce | None = None) -> FusedRegion:
    """Compile a region to one kernel if possible, otherwise to as few as possible, with the
    reasons. known: what was lowered of the same graph before."""
    fusing = _Fusing(region, known or LowerOnce())
    for output in region.outputs:
        fusing.place(output)
    fusing.merge_groups()
    fusing.share_values()
    fusing.round_repeated()
    kernels = tuple(group.lowered for group in fusing.groups)
    reasons = fusing.reasons if len(kernels) > 1 else {}
    return FusedRegion(region, kernels, list(reasons), [str(c) for c in fusing.choices])


@dataclass
class _Group:
    """The outputs of one kernel, what it computes for them, and the kernel."""

    outputs: list[fx.Node]
    computed: frozenset[fx.Node]
    lowered: Lowered


class _Fusing:
    """The kernels of a region while it is being fused, in execution order."""

    def __init__(self, region: Region, known: LowerOnce) -> None:
        self.members, self.known = set(region.nodes), known
        self.groups: list[_Group] = []
        self.reasons: dict[str, None] = {}
        self.choices: list[Choice] = []
        self.as_stored = _read_as_stored(self.members)

    def place(self, node: fx.Node) -> None:
        """Store a node's value in the latest kernel that can also compute it, or in a new one."""
        if any(node in group.outputs for group in self.groups):
            return
        refused = ""
        for k in reversed(range(len(self.groups))):
            try:
                self._replace(k, [*self.groups[k].outputs, node])
                return
            except FusionConflict as conflict:
                refused = refused or str(conflict)
        while True:
            try:
                group = self._attempt([node], len(self.groups))
                break
            except FusionConflict as conflict:
                if conflict.node is node:
                    raise
                refused = str(conflict)
                self.place(conflict.node)
        if refused:
            self.reasons[refused] = None
        self.groups.append(group)

    def merge_groups(self) -> None:
        """Merge kernels that were separated only by the order of the outputs."""
        k = len(self.groups) - 1
        while k > 0:
            for j in range(k):
                try:
                    self._replace(j, [*self.groups[j].outputs, *self.groups[k].outputs])
                except FusionConflict:
                    continue
                del self.groups[k]
                break
            k -= 1

    def share_values(self) -> None:
        """Store values that two kernels compute, if the second then moves fewer bytes in total."""
        for k in range(1, len(self.groups)):
            for j in range(k):
                for node in self._shared(j, k):
                    self._share(node, j, k)

    def _shared(self, j: int, k: int) -> list[fx.Node]:
        """Return the last values that both kernels compute, on the way to their outputs."""
        early, late = (
            find_computed(self.groups[i].outputs, self.members, self._stored(i)) for i in (j, k)
        )
        both = set(early) & set(late)
        own = [n for n in late if n not in both]
        ends = {root_of(n) for m in own for n in tensor_inputs(m)} & both
        return [n for n in late if n in ends and n not in self._stored(len(self.groups))]

    def _share(self, node: fx.Node, j: int, k: int) -> None:
        before = list(self.groups)
        try:
            self._replace(j, [*before[j].outputs, node])
            self._replace(k, before[k].outputs)
        except FusionConflict:
            self.groups = before
            return
        after, self.groups = self.groups, before
        moved = [moved_nbytes([x.lowered.kernel for x in way]) for way in (after, before)]
        choice = Choice(node.name, *moved)
        self.choices.append(choice)
        if choice.is_stored:
            self.groups = after

    def round_repeated(self) -> None:
        """Round values that two kernels compute to what memory would hold, in both: a maximum that
        one of them stores is then not below any value that the other compares with it."""
        if len(self.groups) == 1 or not any(g.dtype(n) in HALVES for n in self.members):
            return
        ends: set[fx.Node] = set()
        stored = self._stored(len(self.groups))
        for early, late in combinations((group.computed for group in self.groups), 2):
            both = early & late
            read = {root_of(n) for m in early ^ late for n in tensor_inputs(m)}
            ends |= both & (read | stored)
            ends |= stored & {root_of(n) for m in both for n in tensor_inputs(m)}
        ends = {n for n in ends if g.dtype(n) in HALVES} - self.as_stored
        self.as_stored |= ends
        for k, group in enumerate(self.groups if ends else ()):
            self._replace(k, group.outputs)

    def _stored(self, k: int) -> set[fx.Node]:
        """Return the nodes that the kernels before index k store."""
        return {n for group in self.groups[:k] for n in group.outputs}

    def _replace(self, k: int, outputs: list[fx.Node]) -> None:
        group = self._attempt(outputs, k)
        self.groups = [*self.groups[:k], group, *self.groups[k + 1 :]]

    def _attempt(self, outputs: list[fx.Node], k: int) -> _Group:
        """Lower outputs to the kernel at index k, which may load what earlier kernels store."""
        stored, inside = self._stored(k), set(outputs)

        def loaded(node: fx.Node) -> bool:
            if node in inside:
                return False
            return node in stored or (not is_view(node) and node not in self.members)

        computed = find_computed(outputs, self.members, stored)
        name, lines = name_kernel(computed), describe_sources(computed)
        lowered = self.known.lower(outputs, loaded, name, lines, self.as_stored)
        return _Group(outputs, frozenset(computed), lowered)


def _read_as_stored(nodes: Collection[fx.Node]) -> frozenset[fx.Node]:
    """Return the half-precision values that one reader takes as memory would hold them: a
    conversion, a comparison. All readers then take the same, so that the difference of `x` and
    `x.float().logsumexp(-1).half()` is 0 where eager's is."""
    return frozenset(
        value
        for n in nodes
        if not is_view(n) and (row := OPS.get(n.target)) is not None and row.kind == "pointwise"
        for value in map(root_of, tensor_inputs(n))
        if g.dtype(value) in HALVES and (row.jumps or g.dtype(n) != g.dtype(value))
    )


def fuse_all(
    graph: fx.Graph, regions: Sequence[Region], hoisted: frozenset[fx.Node]
) -> list[FusedRegion]:
    """Fuse every region; neighbours that compute the same on different parts of one tensor are
    merged.

    For example the rotary embeddings of queries and keys: two regions of one level that read a
    common tensor over the same axes, or over axes of which one continues the other. One kernel
    reads the shared data once, in one launch.
    """
    level, known = _levels(graph, hoisted), LowerOnce()
    done: list[FusedRegion] = []
    places: dict[int, list[int]] = {}  # by level
    for region in regions:
        fused = fuse(region, known)
        beside = places.setdefault(max(level[n][0] for n in region.nodes), [])
        for k in beside:
            joined = _join(done[k], fused, level, known)
            if joined is not None:
                done[k] = joined
                break
        else:
            beside.append(len(done))
            done.append(fused)
    return done


def _join(
    a: FusedRegion, b: FusedRegion, level: Mapping[fx.Node, tuple[int, int]], known: LowerOnce
) -> FusedRegion | None:
    """Merge two regions of one level into one with a single kernel, if possible."""
    if not _are_siblings(a, b):
        return None
    union = _union(a.region, b.region, level)
    (first,), (second,) = a.kernels, b.kernels
    joined = fuse(union, known)
    if len(joined.kernels) == 1 and _is_better(joined.kernels[0], (first, second)):
        return joined
    stacked = fuse_horizontally(first, second) or fuse_horizontally(second, first)
    return None if stacked is None else FusedRegion(union, (stacked,))


def _is_better(one: Lowered, both: tuple[Lowered, Lowered]) -> bool:
    """Return whether one kernel moves no more bytes than two, and keeps parallel loops."""
    serial = one.kernel.columns and not one.kernel.rows
    if serial and not all(x.kernel.columns and not x.kernel.rows for x in both):
        return False
    return compare_nbytes(moved_nbytes([one.kernel]), moved_nbytes([x.kernel for x in both])) <= 0


def _levels(graph: fx.Graph, hoisted: frozenset[fx.Node]) -> dict[fx.Node, tuple[int, int]]:
    """Return the number of calls outside kernels on the path to each node, and its index.

    A region that another one depends on is always at a lower level, so regions of one level are
    independent, whatever is merged.
    """
    places = find_places({n: kind_of(n, hoisted) for n in graph.nodes})
    return {n: (places[n].level, k) for k, n in enumerate(graph.nodes)}


def _are_siblings(a: FusedRegion, b: FusedRegion) -> bool:
    """Return whether two regions have one kernel each, and read a common tensor."""
    if len(a.kernels) != 1 or len(b.kernels) != 1:
        return False
    shared = set(a.region.inputs) & set(b.region.inputs)
    return any(n.op != "get_attr" for n in shared)


def _union(a: Region, b: Region, level: Mapping[fx.Node, tuple[int, int]]) -> Region:
    nodes = sorted({*a.nodes, *b.nodes}, key=lambda n: level[n][1])
    outputs = sorted({*a.outputs, *b.outputs}, key=lambda n: level[n][1])
    return Region(tuple(nodes), tuple(outputs))
