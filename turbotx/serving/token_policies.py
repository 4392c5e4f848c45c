"""Policies for packed batches, where requests of any lengths can share a batch.

In: the waiting requests, the time, `TokenPrices`. Out: batches in execution order, as in
`policies`::

    AgedTokens().plan(waiting, now_ms=12.0, table=costs.prices())[0]      # the batch to run now
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from turbotx.serving.native import load_planner
from turbotx.serving.policies import Aging, Policy
from turbotx.serving.request import Batch, Request
from turbotx.serving.token_costs import TokenPrices

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class FifoTokens:
    """First come, first served, in batches as large as the limits allow."""

    replans: ClassVar[bool] = True

    def plan(self, waiting: Sequence[Request], now_ms: float, table: TokenPrices) -> list[Batch]:
        """Return one batch of the oldest requests, as many as the limits allow."""
        ordered = sorted(waiting, key=lambda r: r.arrival_ms)
        lengths: list[int] = []
        for request in ordered:
            if lengths and math.isinf(table.batch_ms([*lengths, request.length])):
                break
            lengths.append(request.length)
        return [Batch.of(ordered[: len(lengths)], table.batch_ms(lengths), packed=True)]


@dataclass(frozen=True)
class AgedTokens(Aging):
    """The default for packed batches: order the requests, then cut the order into batches.

    1. *Order.* Requests that have waited a third of the age bound, oldest first; then the others by
       urgency (as in ``Aged``) per millisecond of their own cost.
    2. *Cuts.* A batch can hold any lengths, so the order is cut into consecutive batches. A batch's
       milliseconds delay its members, all later requests and future arrivals (counted as in
       ``Aged``); the dynamic program minimizes the sum. No batch exceeds the budget: beyond the
       knee of the costs, a larger batch does not lower the cost per token.
    3. *Overload.* While more than a twelfth of the age bound in work waits, the highest priority is
       planned alone, and its batch is filled with other requests up to twice its cost.
    """

    def plan(self, waiting: Sequence[Request], now_ms: float, table: TokenPrices) -> list[Batch]:
        """Return batches in the order in which to run them."""
        length = np.array([r.length for r in waiting], dtype=np.int64)
        arrival = np.array([r.arrival_ms for r in waiting])
        alone_ms = table.alone_ms(length)
        drain_ms = float(alone_ms.sum())
        score = self.urgency(waiting, arrival, now_ms, drain_ms) / alone_ms
        late = np.where(now_ms - arrival >= self.max_age_ms / 3, arrival, math.inf)
        order = np.lexsort((arrival, -score, late))  # the last key is the primary one
        highest = max(r.priority for r in waiting)
        if drain_ms > self.max_age_ms / 12 and any(r.priority < highest for r in waiting):
            best = self.plan([r for r in waiting if r.priority == highest], now_ms, table)[0]
            ordered = [waiting[i] for i in order.tolist()]
            return [fill_up(best, [r for r in ordered if r.priority < highest], table)]
        weight = np.array([r.weight for r in waiting])[order]
        behind = np.cumsum(weight[::-1])[::-1]
        ends = cut(length[order], table, behind + behind[0] ** 2 / self.burst)
        begins = [0, *ends[:-1]]
        found = []
        for begin, end in zip(begins, ends, strict=True):
            members = [waiting[i] for i in order[begin:end].tolist()]
            cost_ms = table.batch_ms([r.length for r in members])
            found.append(Batch.of(members, cost_ms, packed=True))
        return found


TOKEN_POLICIES: dict[str, type[Policy]] = {"aged": AgedTokens, "fifo": FifoTokens}


def fill_up(batch: Batch, others: Sequence[Request], table: TokenPrices) -> Batch:
    """Return the batch with other requests added, in their order, up to twice its cost."""
    members, tokens = list(batch.requests), batch.tokens
    for request in others:
        fits = tokens + request.length <= table.budget and len(members) < table.max_batch
        if fits and table.batch_ms([*(r.length for r in members), request.length]) <= (
            2 * batch.cost_ms
        ):
            members.append(request)
            tokens += request.length
    return Batch.of(members, table.batch_ms([r.length for r in members]), packed=True)


def cut(lengths: Ints, table: TokenPrices, price: Floats) -> list[int]:
    """Return the ends of the consecutive batches that minimize the sum of price times cost.

    price: per ms of the batch that starts at each position. O(n * members of a batch).
    """
    tokens = np.concatenate(([0], np.cumsum(lengths)))
    squares = np.concatenate(([0.0], np.cumsum(lengths.astype(np.float64) ** 2)))
    limits = (table.max_batch, table.budget)
    costs, price = np.ascontiguousarray(table.by_tokens), np.ascontiguousarray(price)
    run = load_planner("fill_tokens")
    n = len(lengths)
    if run is None:
        size = fill_in_python(tokens, squares, costs, table.square_ms, price, *limits)
    else:
        best, size = np.empty(n + 1), np.zeros(n + 1, dtype=np.int64)
        arrays = (tokens, squares, costs, price, best, size)
        run(n, *limits, table.square_ms, *(a.ctypes.data for a in arrays))
    ends, end = [], n
    while end > 0:
        ends.append(end)
        end -= int(size[end])
    return ends[::-1]


def fill_in_python(
    tokens: Ints, squares: Floats, costs: Floats, square_ms: float, price: Floats,
    max_batch: int, budget: int,
) -> Ints:  # fmt: skip
    """Compute the same as ``native.SOURCE`` in Python, for machines without a compiler."""
    ends, pairs, prices = tokens.tolist(), squares.tolist(), price.tolist()
    best, size = [0.0], [0]
    for j in range(1, len(ends)):
        least, members = math.inf, 1
        for b in range(1, min(j, max_batch) + 1):
            total = ends[j] - ends[j - b]
            if b > 1 and total > budget:
                break
            cost = float(costs[total]) + square_ms * (pairs[j] - pairs[j - b])
            if best[j - b] + prices[j - b] * cost < least:
                least, members = best[j - b] + prices[j - b] * cost, b
        best.append(least)
        size.append(members)
    return np.array(size, dtype=np.int64)
