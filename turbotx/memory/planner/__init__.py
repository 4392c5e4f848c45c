"""Memory: from who lives when to offsets in one arena, planned anew for every shape.

In: lifetimes in launch indices, size classes, sizes of one seed shape. Out: a planner that turns
the sizes of any shape into offsets and a footprint. No torch here, but for `memory.pool`::

    planner = make_planner("symbolic", lifetimes, size_class, names, seed_sizes)
    offsets, footprint_nbytes = planner.offsets(class_nbytes)
"""

from __future__ import annotations

from collections.abc import Sequence

from turbotx.memory.planner.check import check_plan
from turbotx.memory.planner.chunked import ChunkedPlanner
from turbotx.memory.planner.greedy import GreedyPlanner
from turbotx.memory.planner.plan import (
    ALIGNMENT,
    CHUNK_NBYTES,
    Buffer,
    Chunk,
    Lifetime,
    Placement,
    Plan,
    PlanError,
    Planner,
    Workload,
    lower_bound,
)
from turbotx.memory.planner.symbolic import SymbolicPlanner

__all__ = [
    "ALIGNMENT",
    "CHUNK_NBYTES",
    "Buffer",
    "Chunk",
    "Lifetime",
    "Placement",
    "Plan",
    "PlanError",
    "Planner",
    "check_plan",
    "lower_bound",
    "make_planner",
]

PLANNER_KINDS = ("symbolic", "chunked", "greedy")


def make_planner(
    kind: str,
    lifetimes: Sequence[Lifetime],
    size_class: Sequence[int],
    names: Sequence[str],
    seed_sizes: Sequence[int],
    sample_sizes: Sequence[Sequence[int]] = (),
) -> Planner:
    """A planner for a fixed set of buffers whose sizes change with the shape.

    `size_class[i]` is the index of buffer i's size class; `seed_sizes` are bytes per class at
    one representative shape, `sample_sizes` at more of the shapes to expect: the symbolic planner
    is tuned to them, and safe for every other shape as well. Raises PlanError for an unknown
    kind or lists that do not match.
    """
    workload = Workload(tuple(lifetimes), tuple(size_class), tuple(names))
    if kind == "symbolic":
        return SymbolicPlanner(workload, seed_sizes, sample_sizes)
    if kind == "chunked":
        return ChunkedPlanner(workload)
    if kind == "greedy":
        return GreedyPlanner(workload)
    raise PlanError(f"no planner is called {kind!r}; there are {', '.join(PLANNER_KINDS)}")
