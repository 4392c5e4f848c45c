"""Which requests run together, and which group runs first.

In: the waiting requests, the time, a dense cost table. Out: batches in the order in which to run
them. A policy that ``replans`` is asked again before every batch; the others run what they said::

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
    """Turns a queue into batches; has no state and no clock of its own."""

    @property
    def replans(self) -> bool:
        """Whether a plan is made anew before each batch; otherwise it is worked off as a whole."""

    def plan(self, waiting: Sequence[Request], now_ms: float, table: Any) -> list[Batch]:
        """Return batches of waiting requests, the first to run first. table: (length + 1, batch
        + 1) ms; without padding, `token_costs.TokenPrices`."""


@dataclass(frozen=True)
class Single:
    """No batching: the request that came first, alone."""

    replans: ClassVar[bool] = True

    def plan(self, waiting: Sequence[Request], now_ms: float, table: Table) -> list[Batch]:
        """Return the oldest request by itself."""
        first = min(waiting, key=_by_arrival)
        return [Batch.of([first], float(table[first.length, 1]))]


@dataclass(frozen=True)
class Fifo:
    """Padded first come, first served: as many of the oldest as a batch holds."""

    replans: ClassVar[bool] = True

    def plan(self, waiting: Sequence[Request], now_ms: float, table: Table) -> list[Batch]:
        """Return the oldest requests, as many as one batch may have."""
        return slice_in_order(sorted(waiting, key=_by_arrival), table)[:1]


@dataclass(frozen=True)
class SortAndSlice:
    """Sort up to ``batches`` batches of the oldest by length and cut them up (as Infinity)."""

    replans: ClassVar[bool] = False
    batches: int = 8

    def plan(self, waiting: Sequence[Request], now_ms: float, table: Table) -> list[Batch]:
        """Return the oldest requests of several batches, sorted by length and cut into full
        batches."""
        oldest = sorted(waiting, key=_by_arrival)[: self.batches * (table.shape[1] - 1)]
        return slice_in_order(sorted(oldest, key=_by_length), table)


@dataclass(frozen=True)
class PaperDP:
    """The paper's scheduler: split the whole queue at least total cost, run it shortest first."""

    replans: ClassVar[bool] = False

    def plan(self, waiting: Sequence[Request], now_ms: float, table: Table) -> list[Batch]:
        """Return all requests, sorted by length, in the contiguous groups of least total time."""
        ordered = sorted(waiting, key=_by_length)
        groups = split([r.length for r in ordered], table)
        return _batches(ordered, groups, range(len(groups.starts)))


@dataclass(frozen=True)
class Aging:
    """What the default policies have in common: how urgent a request is."""

    replans: ClassVar[bool] = True
    max_age_ms: float = math.inf
    patience: float = 4.0
    crowd: float = 40.0
    burst: float = 10.0
    class_factor: float = 16.0

    def urgency(
        self, waiting: Sequence[Request], arrival: Floats, now_ms: float, drain_ms: float
    ) -> Floats:
        """Return each request's urgency, relative to the greatest. drain_ms: of the whole queue.
        float64, (requests); times in ms."""
        slack = np.array([r.deadline_ms for r in waiting]) - now_ms
        age = np.maximum(np.maximum(now_ms - arrival, drain_ms - slack), 0.0)
        # In logarithms, and relative to the largest: ages of many drains would overflow.
        weight = np.array([r.weight for r in waiting])
        grade = self.patience * (1 + weight.sum() / self.crowd) * np.log1p(age / drain_ms)
        grade += math.log(self.class_factor) * np.array([r.priority for r in waiting])
        grade += np.log(weight)
        urgency: Floats = np.exp(grade - grade.max())
        return urgency


@dataclass(frozen=True)
class Aged(Aging):
    """The default: priced dynamic program, then the most urgent group per millisecond.

    1. *Price.* A millisecond of the server delays everyone who still waits for it: the n - i
       requests of this group and the later ones. Split so that the sum of price times cost is
       least: for a short queue that is the least mean latency over partitions run shortest first.
       Those who will arrive meanwhile are delayed too; a longer queue means more of them, so the
       price has a second part, n * n / ``burst``, and for long queues the split tends to the
       paper's, of least total time.
    2. *Urgency.* A request's is (1 + age / drain) ** p, where drain is the time that the whole
       queue takes: fresh queues run the group with most requests per millisecond first (Smith's
       rule), and one that has waited as long as the queue takes weighs 2**p. The exponent is
       ``patience`` * (1 + n / ``crowd``): the longer the queue, the more the oldest decide, since
       there the tail suffers first.
       A deadline nearer than drain counts as that much age; each step of priority multiplies by
       ``class_factor``; of a client's many that came together each has its part of one request's.
       The group with most urgency per millisecond runs.
    3. *Age bound.* Once a request has waited a third of ``max_age_ms``, the group of the oldest
       request runs, whatever the rest. ``Scheduler`` admits no more than a third of the bound in
       work, so waits stay under it with a third to spare for uneven batches.
    4. *Overload.* While all that waits is more work than a twelfth of the bound, classes are
       strict: the highest is planned as if it were alone, and a batch takes the oldest others that
       are no longer than it is, as long as it does not cost twice as much.
    """

    def plan(self, waiting: Sequence[Request], now_ms: float, table: Table) -> list[Batch]:
        """Return the batches of least total waiting time, those first that a request's age or
        priority demands."""
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
    """Return the batch and the oldest of the others that fit its length, at twice its cost at
    most."""
    row = table[batch.length]
    room = int(np.searchsorted(row[1:], 2 * batch.cost_ms, side="right")) - len(batch.requests)
    fitting = [r for r in others if r.length <= batch.length]
    chosen = sorted(fitting, key=lambda r: (-r.priority, r.arrival_ms))[: max(room, 0)]
    members = (*batch.requests, *chosen)
    return Batch(members, batch.length, float(row[len(members)]))


def slice_in_order(ordered: Sequence[Request], table: Table) -> list[Batch]:
    """Cut a given order into batches, each as long as the table allows (size, padded tokens)."""
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
