"""Restore: a planner from what it found out once, so that loading a saved plan solves nothing.

In: the planner's kind, its workload and, for the symbolic one, its orders. Out: the planner, which
gives the same offsets at every shape as the one they came from::

    restore_planner("symbolic", workload, [{"order": [0, 1], "below": [[], [0]]}])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from turbotx.memory.planner import make_planner
from turbotx.memory.planner.orientation import Orientation
from turbotx.memory.planner.plan import PlanError, Planner, Workload
from turbotx.memory.planner.symbolic import SymbolicPlanner


def restore_planner(
    kind: str, workload: Workload, orientations: Sequence[Mapping[str, Any]]
) -> Planner:
    """Return the planner; raise PlanError for an unknown kind or orders of other buffers."""
    if kind != "symbolic":
        return make_planner(kind, workload.lifetimes, workload.size_class, workload.names, ())
    orders = [
        Orientation(tuple(o["order"]), tuple(tuple(b) for b in o["below"])) for o in orientations
    ]
    for order in orders:
        if sorted(order.order) != list(range(len(workload.names))):
            raise PlanError("an order does not list every buffer once")
    return SymbolicPlanner.of_orientations(workload, orders)
