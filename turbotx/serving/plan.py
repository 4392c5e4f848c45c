"""Plan: splits sorted lengths into contiguous groups of least cost, by dynamic programming.

In: lengths in ascending order and a dense cost table. Out: the groups, as index pairs, with the
least total cost; each group's cost may be weighted by a price::

    split([3, 4, 90], table)         # ((0, 2), (2, 3)): the long one runs alone
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from turbotx.serving.cost import CostTableError, Table
from turbotx.serving.native import load_planner

Ints = NDArray[np.int64]


class Groups(NamedTuple):
    """Half-open index pairs over the sorted queue, shortest first, and each group's cost."""

    starts: Ints
    ends: Ints
    cost_ms: NDArray[np.float64]

    @property
    def total_ms(self) -> float:
        """Estimated milliseconds of all groups together."""
        return float(self.cost_ms.sum())

    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Begin and end of each group in the sorted lengths, half-open."""
        return tuple(zip(self.starts.tolist(), self.ends.tolist(), strict=True))


def split(lengths: Sequence[int] | Ints, table: Table, price: Table | None = None) -> Groups:
    """Run the paper's program: S[j] = min over b of S[j-b] + price[j-b] * cost[length_j][b].

    lengths: ascending. table: ``CostTable.dense()``. price: weight of a group's cost by its start;
    None: all ones, and then the groups have the least total cost of any partition, contiguous or
    not, if the table is monotone (exchange argument: giving the shorter of two groups the shorter
    requests never costs more). O(n * max_batch). Algorithm: Fang et al., PPoPP'21, arXiv
    2010.05680, section 5. Raises ValueError for lengths that descend, CostTableError for those
    beyond the table.
    """
    length = np.ascontiguousarray(lengths, dtype=np.int64)
    n = len(length)
    if n and (length[0] < 1 or length[-1] >= len(table)):
        raise CostTableError(
            f"lengths run from {length[0]} to {length[-1]}, the cost table from 1 to "
            f"{len(table) - 1}: truncate the request or measure a larger grid"
        )
    if n and (np.diff(length) < 0).any():
        raise ValueError("the dynamic program needs the lengths in ascending order")
    prices = np.ones(n) if price is None else np.ascontiguousarray(price, dtype=np.float64)
    sizes = _fill(length, np.ascontiguousarray(table), prices)
    ends = []
    end = n
    while end > 0:
        ends.append(end)
        end -= int(sizes[end])
    upper = np.array(ends[::-1], dtype=np.int64)
    lower = np.concatenate(([0], upper[:-1])).astype(np.int64) if n else upper
    return Groups(lower, upper, table[length[upper - 1], upper - lower])


def _fill(length: Ints, table: Table, price: Table) -> Ints:
    fill = load_planner("fill")
    if fill is None:
        return fill_in_python(length, table, price)
    n = len(length)
    best, size = np.empty(n + 1), np.zeros(n + 1, dtype=np.int64)
    arrays = (length, table, price, best, size)
    fill(n, table.shape[1] - 1, table.shape[1], *(a.ctypes.data for a in arrays))
    return size


def fill_in_python(length: Ints, table: Table, price: Table) -> Ints:
    """Compute the same as ``native.SOURCE`` in Python, for machines without a compiler."""
    max_batch = table.shape[1] - 1
    rows = {n: table[n].tolist() for n in set(length.tolist())}
    prices = price.tolist()
    best, size = [0.0], [0]
    for j, n in enumerate(length.tolist(), start=1):
        row, least, members = rows[n], math.inf, 1
        for b in range(1, min(j, max_batch) + 1):
            total = best[j - b] + prices[j - b] * row[b]
            if total < least:
                least, members = total, b
        best.append(least)
        size.append(members)
    return np.array(size, dtype=np.int64)
