"""Scheduler: the queue between request handlers and the engine; it selects the next batch.

In: requests, and the current time with each call (it has no clock). Out: the batch to run now, or
when to call again::

    scheduler.submit(request, now_ms)      # raises Overloaded if it could not be served in time
    batch = scheduler.next(now_ms)         # None: no batch is due before scheduler.wake_ms()
    scheduler.complete(batch, took_ms)     # refines the cost table
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from turbotx.errors import TurbotxError
from turbotx.serving.cost import CostTableError
from turbotx.serving.policies import Aged, Policy
from turbotx.serving.request import Batch, Request
from turbotx.serving.token_costs import BatchCosts, Prices, TokenCosts
from turbotx.serving.token_policies import AgedTokens


class Overloaded(TurbotxError):
    """The queue is full: retry after ``retry_after_ms``."""

    def __init__(self, message: str, retry_after_ms: float) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class Trigger(Protocol):
    """Decides when an idle engine starts a batch."""

    def ready_ms(self, waiting: Sequence[Request], now_ms: float) -> float:
        """Return the earliest time of a batch; ``now_ms`` or less means now."""


@dataclass(frozen=True)
class Hungry:
    """Starts a batch whenever the engine is idle and a request waits."""

    def ready_ms(self, waiting: Sequence[Request], now_ms: float) -> float:
        """Return `now_ms`."""
        return now_ms


@dataclass(frozen=True)
class Lazy:
    """Starts a batch if it is full or its oldest request has waited ``timeout_ms``."""

    timeout_ms: float
    max_batch: int
    max_tokens: int | None = None  # including padding, if batches are padded
    packed: bool = False

    def ready_ms(self, waiting: Sequence[Request], now_ms: float) -> float:
        """Return `now_ms` for a full batch, else arrival of the oldest request plus
        ``timeout_ms``."""
        if len(waiting) >= self.max_batch:
            return now_ms
        if self.max_tokens is not None:
            lengths = [r.length for r in waiting]
            tokens = sum(lengths) if self.packed else max(lengths) * len(lengths)
            if tokens >= self.max_tokens:
                return now_ms
        return min(r.arrival_ms for r in waiting) + self.timeout_ms


@dataclass
class Scheduler:
    """A queue with a policy, a trigger and limits. Not thread-safe."""

    costs: BatchCosts  # a CostTable, or TokenCosts without padding
    policy: Policy | None = None  # None: Aged or AgedTokens
    trigger: Trigger = field(default_factory=Hungry)
    max_batch: int | None = None  # None: the costs' limit
    max_batch_tokens: int | None = None  # a single request may exceed it
    max_queue: int = 4096
    max_age_ms: float = math.inf  # bound of the wait; a third of it in work is admitted

    def __post_init__(self) -> None:
        if self.policy is None:
            kind = AgedTokens if self.packed else Aged
            self.policy = kind(max_age_ms=self.max_age_ms)
        self._waiting: dict[Hashable, Request] = {}
        self._planned: list[Batch] = []
        self._backlog_ms = 0.0  # sum of share_ms of the waiting requests
        self._shares: dict[Hashable, float] = {}
        self._excess = 1.0  # smoothed ratio of batch cost to the sum of its requests' share_ms

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def waiting(self) -> list[Request]:
        """The waiting requests, oldest first."""
        return list(self._waiting.values())

    @property
    def packed(self) -> bool:
        """Whether batches run without padding."""
        return isinstance(self.costs, TokenCosts)

    @property
    def prices(self) -> Prices:
        """The policy's cost table: estimated ms of batches within the limits."""
        return self.costs.prices(self.max_batch, self.max_batch_tokens)

    @property
    def backlog_ms(self) -> float:
        """Estimated ms to compute all waiting requests, scaled by the efficiency of recent
        batches."""
        return self._backlog_ms * self._excess if self._waiting else 0.0

    def full(self, priority: int = 0) -> bool:
        """Whether the next request of this priority would be refused; O(1).

        Lower priorities are refused first, see ``most_ms``.
        """
        return len(self._waiting) >= self.max_queue or self.backlog_ms > self.most_ms(priority)

    def most_ms(self, priority: int) -> float:
        """Return the ms of waiting work up to which a priority is admitted: 1/6, 1/3 and 1/2 of the
        age bound for low, normal and high."""
        return self.max_age_ms / 3 * max(1 + priority / 2, 0.25)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises Overloaded, CostTableError (length), ValueError (key in use).

        Patient requests were admitted before, with their whole large request.
        """
        if request.key in self._waiting:
            raise ValueError(f"a request with the key {request.key!r} already waits")
        if not 1 <= request.length <= self.costs.max_length:
            raise CostTableError(
                f"a request has {request.length} tokens, the cost table covers 1 to "
                f"{self.costs.max_length}: truncate it or measure longer ones"
            )
        if not request.patient and self.full(request.priority):
            raise Overloaded(
                f"{len(self._waiting)} requests wait, about {self.backlog_ms:.0f} ms of work "
                f"(limits: {self.max_queue} requests, {self.most_ms(request.priority):.0f} ms)",
                max(self.backlog_ms / 2, 1.0),
            )
        share = self.share_ms(request.length)
        self._waiting[request.key] = request
        self._shares[request.key] = share
        self._backlog_ms += share

    def raise_to(
        self, key: Hashable, deadline_ms: float, priority: int, weight: float = 0.0
    ) -> None:
        """Merge a request into an equal waiting one, which gets the higher priority and weight of
        both and the later deadline. Does nothing if `key` is not waiting."""
        request = self._waiting.get(key)
        if request is not None:
            self._waiting[key] = replace(
                request,
                deadline_ms=max(request.deadline_ms, deadline_ms),
                priority=max(request.priority, priority),
                weight=max(request.weight, weight),
            )

    def cancel(self, key: Hashable) -> bool:
        """Remove a waiting request; return False if it is not waiting."""
        request = self._waiting.get(key)
        if request is None:
            return False
        self._forget(request)
        kept = []
        for batch in self._planned:
            rest = [r for r in batch.requests if r.key != key]
            if len(rest) == len(batch.requests):
                kept.append(batch)
            elif rest:
                cost_ms = self.costs.batch_ms([r.length for r in rest])
                kept.append(Batch.of(rest, cost_ms, self.packed))
        self._planned = kept
        return True

    def expire(self, now_ms: float) -> list[Request]:
        """Remove and return requests that have waited ``max_age_ms``; the caller refuses them.

        This happens only if batches took far longer than the table predicted.
        """
        late = [
            r for r in self._waiting.values()
            if now_ms - r.arrival_ms >= self.max_age_ms and not r.patient
        ]  # fmt: skip
        for request in late:
            self.cancel(request.key)
        return late

    def overdue(self, now_ms: float) -> list[Request]:
        """Remove and return requests whose deadline has passed."""
        late = [r for r in self._waiting.values() if r.deadline_ms < now_ms]
        for request in late:
            self.cancel(request.key)
        return late

    def next(self, now_ms: float) -> Batch | None:
        """Remove and return the batch to run now; None before ``wake_ms``."""
        batch = self.peek(now_ms)
        if batch is not None:
            self.take(batch)
        return batch

    def peek(self, now_ms: float) -> Batch | None:
        """Return the batch that ``next`` would return, without removing it."""
        if self._planned:
            return self._planned[0]
        if not self._waiting or self.trigger.ready_ms(self.waiting, now_ms) > now_ms:
            return None
        assert self.policy is not None
        if len(self._waiting) == 1:  # there is nothing to choose
            waiting = self.waiting
            cost_ms = self.costs.batch_ms([waiting[0].length])
            return Batch.of(waiting, cost_ms, self.packed)
        batches = self.policy.plan(self.waiting, now_ms, self.prices)
        if not self.policy.replans:
            self._planned = batches
        return batches[0]

    def take(self, batch: Batch) -> None:
        """Remove a batch returned by ``peek`` from the queue."""
        if self._planned:
            self._planned.pop(0)
        excess = batch.cost_ms / sum(self._shares[r.key] for r in batch.requests)
        if len(self._waiting) > len(batch.requests):  # the policy had a choice
            self._excess += 0.1 * (excess - self._excess)
        for request in batch.requests:
            self._forget(request)

    def wake_ms(self, now_ms: float) -> float:
        """Return when to call ``next`` again if nothing arrives; infinity for an empty queue."""
        if not self._waiting:
            return math.inf
        if self._planned:
            return now_ms
        return max(now_ms, self.trigger.ready_ms(self.waiting, now_ms))

    def complete(self, batch: Batch, took_ms: float) -> None:
        """Record the measured time of an executed batch."""
        self.costs.learn(batch.lengths, took_ms)

    def share_ms(self, length: int, model: str = "") -> float:
        """Return ms of one request in the largest batch of equal requests that the limits allow."""
        return self.costs.share_ms(length, self.max_batch, self.max_batch_tokens)

    def _forget(self, request: Request) -> None:
        del self._waiting[request.key]
        self._backlog_ms -= self._shares.pop(request.key)
