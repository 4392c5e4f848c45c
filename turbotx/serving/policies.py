"""Which requests run together, and which group runs first.

In: the waiting requests, the time, a dense cost table. Out: batches in execution order. A policy
that ``replans`` is called again before every batch; the plan of others is executed as a whole::

    Aged().plan(waiting, now_ms=12.0, table=table)[0]      # the batch to run now
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from turbotx.serving.cost import Table
from turbotx.serving.plan import Groups, split
from turbotx.serving.request import Batch, Request

Floats = NDArray[np.float64]


class Policy(Protocol):
    """Groups a queue into batches; stateless, without a clock."""

    @property
    def replans(self) -> bool:
        """Whether to plan again before each batch, rather than execute a plan as a whole."""

    def plan(self, waiting: Sequence[Request], now_ms: float, table: Any) -> list[Batch]:
        """Return batches of waiting requests in execution order.

        table: float64 (length + 1, batch + 1) in ms; without padding a
        `token_costs.TokenPrices`."""


@dataclass(frozen=True)
class Single:
    """No batching: first come, first served."""

    replans: ClassVar[bool] = True

    def plan(self, waiting: Sequence[Request], now_ms: float, table: Table) -> list[Batch]:
        """Return the oldest request by itself."""
        first = min(waiting, key=_by_arrival)
        return [Batch.of([first], float(table[first.length, 1]))]


@dataclass(frozen=True)
class Fifo:
    """First come, first served, in padded batches of the largest size."""

    replans: ClassVar[bool] = True

    def plan(self, waiting: Sequence[Request], now_ms: float, table: Table) -> list[Batch]:
        """Return one batch of the oldest requests, as many as the limits allow."""
        return slice_in_order(sorted(waiting, key=_by_arrival), table)[:1]


@dataclass(frozen=True)
class SortAndSlice:
    """Sort the oldest requests of up to ``batches`` batches by length, then slice (as Infinity)."""

    replans: ClassVar[bool] = False
    batches: int = 8

    def plan(self, waiting: Sequence[Request], now_ms: float, table: Table) -> list[Batch]:
        """Return the oldest requests of several batches, sorted by length and cut into full
        batches."""
        oldest = sorted(waiting, key=_by_arrival)[: self.batches * (table.shape[1] - 1)]
        return slice_in_order(sorted(oldest, key=_by_length), table)


@dataclass(frozen=True)
class PaperDP:
    """The paper's scheduler: partition the whole queue at least total cost, shortest first."""

    replans: ClassVar[bool] = False

    def plan(self, waiting: Sequence[Request], now_ms: float, table: Table) -> list[Batch]:
        """Return all requests, sorted by length, in the contiguous groups of least total time."""
        ordered = sorted(waiting, key=_by_length)
        groups = split([r.length for r in ordered], table)
        return _batches(ordered, groups, range(len(groups.starts)))


@dataclass(frozen=True)
class Aging:
    """Base of the default policies: the urgency of a request."""

    replans: ClassVar[bool] = True
    max_age_ms: float = math.inf
    patience: float = 4.0
    crowd: float = 40.0
    burst: float = 10.0
    class_factor: float = 16.0

    def urgency(
        self, waiting: Sequence[Request], arrival: Floats, now_ms: float, drain_ms: float
    ) -> Floats:
        """Return each request's urgency relative to the greatest, float64 (requests,).

        arrival: (requests,) in ms. drain_ms: estimated ms of the whole queue."""
        slack = np.array([r.deadline_ms for r in waiting]) - now_ms
        age = np.maximum(np.maximum(now_ms - arrival, drain_ms - slack), 0.0)
        # Logarithms relative to the largest: powers of large ages would overflow.
        weight = np.array([r.weight for r in waiting])
        grade = self.patience * (1 + weight.sum() / self.crowd) * np.log1p(age / drain_ms)
        grade += math.log(self.class_factor) * np.array([r.priority for r in waiting])
        grade += np.log(weight)
        urgency: Floats = np.exp(grade - grade.max())
        return urgency


@dataclass(frozen=True)
class Aged(Aging):
    """The default: dynamic program with prices, then the group with most urgency per millisecond.

    1. *Price.* A millisecond of the engine delays the n - i requests of this group and the later
       ones. The partition minimizes the sum of price times cost: for a short queue, the mean
       latency when run shortest first. Requests that arrive meanwhile are delayed too, more of them
       for a longer queue: a second term, n * n / ``burst``, makes the partition of long queues tend
       to the paper's, of least total time.
    2. *Urgency.* A request's is (1 + age / drain) ** p, where drain is the estimated time of the
       whole queue: new requests run in the order of most requests per millisecond (Smith's rule);
       one with age = drain has weight 2**p. The exponent p = ``patience`` * (1 + n / ``crowd``)
       grows with the queue, to bound tail latency. A deadline nearer than drain counts as that much
       age; each step of priority multiplies by ``class_factor``; the rows of one large request
       share the weight of one. The group with most urgency per millisecond runs.
    3. *Age bound.* Once a request has waited a third of ``max_age_ms``, the group of the oldest
       request runs. ``Scheduler`` admits at most a third of the bound in work, which leaves a third
       for errors of the estimate.
    4. *Overload.* While more than a twelfth of the bound in work waits, priorities are strict: the
       highest is planned alone, then its batch is filled with the oldest other requests that are no
       longer, up to twice its cost.
    """

    def plan(self, waiting: Sequence[Request], now_ms: float, table: Table) -> list[Batch]:
        """Return batches in execution order; see the class."""
        length = np.array([r.length for r in waiting])
        arrival = np.array([r.arrival_ms for r in waiting])
        by_length = np.lexsort((arrival, length))
        n = len(by_length)
        price = np.arange(n, 0, -1, dtype=np.float64) + n * n / self.burst
        groups = split(length[by_length], table, price)
        highest = max(r.priority for r in waiting)
        if groups.total_ms > self.max_age_ms / 12 and any(r.priority < highest for r in waiting):
            best = self.plan([r for r in waiting if r.priority == highest], now_ms, table)[0]
            return [fill_up(best, [r for r in waiting if r.priority < highest], table)]
        urgency = self.urgency(waiting, arrival, now_ms, groups.total_ms)[by_length]
        score = np.add.reduceat(urgency, groups.starts) / groups.cost_ms
        order = np.argsort(-score, kind="stable")
        oldest = int(np.argmin(arrival[by_length]))
        if now_ms - arrival[by_length[oldest]] >= self.max_age_ms / 3:
            first = int(np.searchsorted(groups.ends, oldest, side="right"))
            order = np.concatenate(([first], order[order != first]))
        return _batches([waiting[i] for i in by_length.tolist()], groups, order.tolist())


POLICIES: dict[str, type[Policy]] = {
    "aged": Aged,
    "dp": PaperDP,
    "sort": SortAndSlice,
    "fifo": Fifo,
    "single": Single,
}


def fill_up(batch: Batch, others: Sequence[Request], table: Table) -> Batch:
    """Return the batch with the oldest other requests added that fit its length, up to twice its
    cost."""
    row = table[batch.length]
    room = int(np.searchsorted(row[1:], 2 * batch.cost_ms, side="right")) - len(batch.requests)
    fitting = [r for r in others if r.length <= batch.length]
    chosen = sorted(fitting, key=lambda r: (-r.priority, r.arrival_ms))[: max(room, 0)]
    members = (*batch.requests, *chosen)
    return Batch(members, batch.length, float(row[len(members)]))


def slice_in_order(ordered: Sequence[Request], table: Table) -> list[Batch]:
    """Slice a given order into the largest batches that the table allows (size, padded tokens)."""
    most = table.shape[1] - 1
    batches: list[Batch] = []
    members: list[Request] = []
    length = 0
    for request in ordered:
        longest = max(length, request.length)
        if members and (len(members) == most or math.isinf(table[longest, len(members) + 1])):
            batches.append(Batch.of(members, float(table[length, len(members)])))
            members, longest = [], request.length
        members.append(request)
        length = longest
    if members:
        batches.append(Batch.of(members, float(table[length, len(members)])))
    return batches


def _batches(ordered: Sequence[Request], groups: Groups, order: Sequence[int]) -> list[Batch]:
    pairs, costs = groups.pairs(), groups.cost_ms.tolist()
    batches = []
    for group in order:
        start, end = pairs[group]
        batches.append(Batch(tuple(ordered[start:end]), ordered[end - 1].length, costs[group]))
    return batches


def _by_arrival(request: Request) -> float:
    return request.arrival_ms


def _by_length(request: Request) -> tuple[int, float]:
    return request.length, request.arrival_ms
