"""Lanes: one scheduler per model on a shared engine, with the interface of one scheduler.

In: a scheduler per model; requests with their model's name. Out: the next batch of any of them, so
that the dispatcher does not depend on the number of models::

    lanes = Lanes({"a": Scheduler(costs_a), "b": Scheduler(costs_b)})
    lanes.submit(Request("key", length=9, arrival_ms=0.0, model="b")); lanes.next(now_ms=0.0)
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

from turbotx.serving.policies import Aged
from turbotx.serving.request import Batch, Request
from turbotx.serving.scheduler import Overloaded, Scheduler


class Lanes:
    """All models share the engine's time: admission and urgency count the work of all of them.

    Each queue plans its next batch. The batch that runs is the one with a request that has waited a
    third of the age bound; otherwise, while more than a twelfth of the bound in work waits, one of
    the highest priority; otherwise the one with most urgency per ms (as ``policies.Aged``).
    """

    def __init__(self, queues: Mapping[str, Scheduler]) -> None:
        self.queues = dict(queues)
        self._first = next(iter(self.queues.values()))
        self.max_age_ms, self.max_queue = self._first.max_age_ms, self._first.max_queue
        self._aged = Aged(max_age_ms=self.max_age_ms)

    def __len__(self) -> int:
        return sum(map(len, self.queues.values()))

    @property
    def waiting(self) -> list[Request]:
        """The waiting requests of all queues."""
        return [r for queue in self.queues.values() for r in queue.waiting]

    @property
    def backlog_ms(self) -> float:
        """Estimated ms to compute all waiting requests."""
        return sum(queue.backlog_ms for queue in self.queues.values())

    def full(self, priority: int = 0) -> bool:
        """Whether the next request of this priority would be refused, for any model."""
        most_ms = self._first.most_ms(priority)
        return len(self) >= self.max_queue or self.backlog_ms > most_ms

    def submit(self, request: Request) -> None:
        """Queue a request, see ``Scheduler.submit``; the limits hold for all queues together.
        Raises Overloaded."""
        if not request.patient and self.full(request.priority):
            raise Overloaded(
                f"{len(self)} requests wait, about {self.backlog_ms:.0f} ms of work",
                max(self.backlog_ms / 2, 1.0),
            )
        self.queues[request.model].submit(request)

    def raise_to(
        self, key: Hashable, deadline_ms: float, priority: int, weight: float = 0.0
    ) -> None:
        """Join a request to an equal one that waits: see ``Scheduler.raise_to``."""
        for queue in self.queues.values():
            queue.raise_to(key, deadline_ms, priority, weight)

    def cancel(self, key: Hashable) -> bool:
        """Remove a waiting request; return False if it is not waiting."""
        return any(queue.cancel(key) for queue in self.queues.values())

    def expire(self, now_ms: float) -> list[Request]:
        """Remove and return requests that have waited ``max_age_ms``."""
        return [r for queue in self.queues.values() for r in queue.expire(now_ms)]

    def overdue(self, now_ms: float) -> list[Request]:
        """Remove and return requests whose deadline has passed."""
        return [r for queue in self.queues.values() for r in queue.overdue(now_ms)]

    def next(self, now_ms: float) -> Batch | None:
        """Remove and return the batch to run now; None before ``wake_ms``."""
        planned = [(q.peek(now_ms), q) for q in self.queues.values()]
        ready = [(batch, queue) for batch, queue in planned if batch is not None]
        if not ready:
            return None
        batch, queue = max(ready, key=lambda pair: self._rank(pair[0], now_ms))
        queue.take(batch)
        return batch

    def wake_ms(self, now_ms: float) -> float:
        """Return when to call ``next`` again if nothing arrives; infinity for empty queues."""
        return min(queue.wake_ms(now_ms) for queue in self.queues.values())

    def complete(self, batch: Batch, took_ms: float) -> None:
        """Record the measured time of an executed batch."""
        self.queues[batch.requests[0].model].complete(batch, took_ms)

    def share_ms(self, length: int, model: str) -> float:
        """Return ms of one request in a full batch of equal requests of its model."""
        return self.queues[model].share_ms(length)

    def _rank(self, batch: Batch, now_ms: float) -> tuple[float, float, float]:
        """Return the sort key of a batch: age above its bound, priority, urgency per ms."""
        drain_ms = max(self.backlog_ms, batch.cost_ms)
        oldest_ms = max(now_ms - r.arrival_ms for r in batch.requests)
        strict = drain_ms > self.max_age_ms / 12
        urgency = 0.0
        for r in batch.requests:
            age_ms = max(now_ms - r.arrival_ms, drain_ms - (r.deadline_ms - now_ms), 0.0)
            grade = self._aged.patience * math.log1p(age_ms / drain_ms)
            urgency += math.exp(min(grade, 500.0)) * self._aged.class_factor**r.priority * r.weight
        return (
            oldest_ms if oldest_ms >= self.max_age_ms / 3 else 0.0,
            float(max(r.priority for r in batch.requests)) if strict else 0.0,
            urgency / batch.cost_ms,
        )
