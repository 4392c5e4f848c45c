"""Lanes: the queues of several models that share one engine, and which runs its batch next.

In: a scheduler for each model; requests that name theirs. Out: what one scheduler gives, so that
the dispatcher need not know how many there are::

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

    Each queue plans its own next batch. Of those runs the one with a request that has waited a
    third of the age bound; else, while a twelfth of the bound in work waits, one of the highest
    class; else the one with most urgency per millisecond, as within a queue (``policies.Aged``).
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
        """The requests of all queues that no batch has taken."""
        return [r for queue in self.queues.values() for r in queue.waiting]

    @property
    def backlog_ms(self) -> float:
        """Estimated time to compute everything that waits."""
        return sum(queue.backlog_ms for queue in self.queues.values())

    def full(self, priority: int = 0) -> bool:
        """Whether the next request of this class would be refused, whichever model it is for."""
        most_ms = self._first.most_ms(priority)
        return len(self) >= self.max_queue or self.backlog_ms > most_ms

    def submit(self, request: Request) -> None:
        """As ``Scheduler.submit``; the limits are of all queues together. Raises Overloaded."""
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
        """Forget a waiting request; False when it is not waiting (any more)."""
        return any(queue.cancel(key) for queue in self.queues.values())

    def expire(self, now_ms: float) -> list[Request]:
        """Take requests off their queues that have waited ``max_age_ms``."""
        return [r for queue in self.queues.values() for r in queue.expire(now_ms)]

    def overdue(self, now_ms: float) -> list[Request]:
        """Take requests off their queues whose deadline has passed."""
        return [r for queue in self.queues.values() for r in queue.overdue(now_ms)]

    def next(self, now_ms: float) -> Batch | None:
        """Take the batch to run now off its queue, or None before ``wake_ms``."""
        planned = [(q.peek(now_ms), q) for q in self.queues.values()]
        ready = [(batch, queue) for batch, queue in planned if batch is not None]
        if not ready:
            return None
        batch, queue = max(ready, key=lambda pair: self._rank(pair[0], now_ms))
        queue.take(batch)
        return batch

    def wake_ms(self, now_ms: float) -> float:
        """Return when to ask ``next`` again if nothing arrives: infinity for empty queues."""
        return min(queue.wake_ms(now_ms) for queue in self.queues.values())

    def complete(self, batch: Batch, took_ms: float) -> None:
        """Record the measured time of an executed batch."""
        self.queues[batch.requests[0].model].complete(batch, took_ms)

    def share_ms(self, length: int, model: str) -> float:
        """Return a request's part of a full batch of its like, of its model."""
        return self.queues[model].share_ms(length)

    def _rank(self, batch: Batch, now_ms: float) -> tuple[float, float, float]:
        """Return what decides, the greatest first: age beyond bounds, class, urgency."""
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
