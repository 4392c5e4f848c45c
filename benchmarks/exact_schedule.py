"""The best that any scheduler could do: exact, and only for a handful of requests.

In: a trace, a cost table. Out: the least mean latency that a schedule can have, in ms::

    least_mean_latency_ms(trace, toy_table())  ->  61.3
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from turbotx.serving import CostTable, Request


def least_mean_latency_ms(trace: Sequence[Request], costs: CostTable) -> float:
    """Return the least mean latency, in ms, of any schedule that knows all arrivals beforehand.

    Exact, by dynamic programming over the subsets already served; each keeps its Pareto front of
    (end of the last batch, sum of completion times). A batch starts when the engine is free and its
    last member is there. About 3**n steps: for up to ten requests. Raises ValueError beyond 12.
    """
    n = len(trace)
    if n > 12:
        raise ValueError(
            f"{n} requests have {3**n} transitions: the exact optimum is for 12 or less"
        )
    table = costs.dense()
    full = (1 << n) - 1
    length, arrival, count = [0] * (full + 1), [0.0] * (full + 1), [0] * (full + 1)
    for mask in range(1, full + 1):
        low, rest = (mask & -mask).bit_length() - 1, mask & (mask - 1)
        length[mask] = max(length[rest], trace[low].length)
        arrival[mask] = max(arrival[rest], trace[low].arrival_ms)
        count[mask] = count[rest] + 1
    fronts: list[list[tuple[float, float]]] = [[] for _ in range(full + 1)]
    fronts[0] = [(-math.inf, 0.0)]
    for served in range(full):
        front = pareto_front(fronts[served])
        left = full ^ served
        members = left
        while members:
            size = count[members]
            if size < table.shape[1]:
                cost, start = float(table[length[members], size]), arrival[members]
                reached = fronts[served | members]
                for end, total in front:
                    finish = max(end, start) + cost
                    reached.append((finish, total + size * finish))
            members = (members - 1) & left
    least = min(total for _, total in fronts[full])
    return (least - sum(r.arrival_ms for r in trace)) / n


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other is at least as good as in both coordinates."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front
