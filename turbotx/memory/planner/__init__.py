"""Memory planners: compute offsets in one arena from lifetimes, for every shape.

In: lifetimes in launch indices, size classes, sizes at a seed shape. Out: a planner that maps the
sizes at any shape to offsets and a footprint. No torch here::

    planner = make_planner("symbolic", lifetimes, size_class, names, seed_sizes)
    offsets, footprint_nbytes = planner.offsets(class_nbytes)
"""

from __future__ import annotations

from collections.abc import Sequence

from turbotx.memory.planner.check import check_plan
from turbotx.memory.planner.chunked import ChunkedPlanner
from turbotx.memory.planner.greedy import GreedyPlanner
from turbotx.memory.planner.orientation import Orientation
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
from turbotx.memory.planner.symbolic import SymbolicPlanner, solve_orientations

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
    "Workload",
    "check_plan",
    "find_orientations",
    "lower_bound",
    "make_planner",
    "restore_planner",
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
    """Return a planner for a fixed set of buffers whose sizes change with the shape.

    size_class: by buffer, the index of its size class. Others as of `find_orientations`. Raises
    PlanError for an unknown kind or lists of different lengths.
    """
    workload = Workload(tuple(lifetimes), tuple(size_class), tuple(names))
    found = find_orientations(kind, workload, seed_sizes, sample_sizes)
    return restore_planner(kind, workload, found)


def find_orientations(
    kind: str,
    workload: Workload,
    seed_sizes: Sequence[int],
    sample_sizes: Sequence[Sequence[int]] = (),
) -> tuple[Orientation, ...]:
    """Return what a planner precomputes, for `restore_planner`: empty except for the symbolic one.

    seed_sizes: bytes per class at one representative shape.
    sample_sizes: the same at further expected shapes. The symbolic planner is tuned to these
    shapes, and valid for all others.
    """
    return solve_orientations(workload, seed_sizes, sample_sizes) if kind == "symbolic" else ()


def restore_planner(kind: str, workload: Workload, orientations: Sequence[Orientation]) -> Planner:
    """Return a planner from precomputed orientations; its offsets are the same at every shape.

    Raises PlanError for an unknown kind or orientations of other buffers.
    """
    if kind == "chunked":
        return ChunkedPlanner(workload)
    if kind == "greedy":
        return GreedyPlanner(workload)
    if kind != "symbolic":
        raise PlanError(f"no planner is called {kind!r}: use one of {', '.join(PLANNER_KINDS)}")
    if any(sorted(o.order) != list(range(len(workload.names))) for o in orientations):
        raise PlanError("an order does not list every buffer once")
    return SymbolicPlanner(workload, orientations)
