"""Dispatcher: runs the scheduler in real time, between an event loop and the engine's thread.

In: token rows, each awaited by one or more requests. Out: their vectors; identical rows in flight
are computed once, rows whose requests were all cancelled are removed from the queue::

    vector = await dispatcher.compute(row, deadline_ms=dispatcher.now_ms() + 500)
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from turbotx.serving.cache import CacheKey, ResponseCache
from turbotx.serving.engine import BatchEngine, Rows
from turbotx.serving.idle import IdleMeasuring, Shape
from turbotx.serving.lanes import Lanes
from turbotx.serving.metrics import Metrics
from turbotx.serving.pending import Lane, PendingRow
from turbotx.serving.refusals import BackendFailed, Busy, Late, NotReady, Refusal
from turbotx.serving.request import Batch, Request
from turbotx.serving.scheduler import Overloaded, Scheduler
from turbotx.serving.tokens import TokenRow

log = logging.getLogger(__name__)


Joined = PendingRow | NDArray[np.float32]  # a row in flight, or a cached vector


class Dispatcher:
    """Owns the scheduler; every method runs on the event loop but ``_compute``."""

    def __init__(
        self,
        lanes: BatchEngine | Mapping[str, Lane],
        scheduler: Scheduler | Lanes,
        cache: ResponseCache,
        metrics: Metrics,
        *,
        coalesce: bool = True,
        idle: IdleMeasuring | None = None,
    ) -> None:
        """``lanes`` by the names that requests give their models, or one engine for all."""
        self.lanes = lanes if isinstance(lanes, Mapping) else {"": Lane(lanes)}
        self.scheduler = scheduler
        self.cache, self.metrics = cache, metrics
        self.coalesce, self.idle = coalesce, idle
        self._jobs: dict[Hashable, PendingRow] = {}
        self._in_flight: dict[CacheKey, PendingRow] = {}
        self._keys = itertools.count()
        self._turns: deque[asyncio.Future[None]] = deque()  # large requests waiting
        self._entering = 0  # large requests that have not queued all rows yet
        self._held_ms = 0.0  # estimated ms of their rows that are not queued yet
        self._computed: tuple[Batch, list[PendingRow], Rows, float] | None = None  # not answered
        self._wake = asyncio.Event()
        metrics.queue_size.set_function(lambda: len(scheduler))
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="turbotx-engine")

    def now_ms(self) -> float:
        """Return the current time in ms, on the clock of deadlines and arrivals."""
        return time.perf_counter() * 1e3

    def start(self) -> None:
        """Start the task that runs batches, in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def alive(self) -> bool:
        """Whether the task that runs batches was started and has not ended."""
        return self._task is not None and not self._task.done()

    def full(self, priority: int) -> bool:
        """Whether the next request of this priority would be refused; O(1)."""
        return self.scheduler.full(priority)

    def refuse_busy(self) -> Busy:
        """Return the error for a request that is not admitted; its retry_after_s is half the
        estimated backlog."""
        work_ms = self.scheduler.backlog_ms + self._held_ms
        return Busy("the queue is full", retry_after_s=max(work_ms / 2e3, 0.001))

    async def compute(
        self, row: TokenRow, *, deadline_ms: float = math.inf, priority: int = 0
    ) -> NDArray[np.float32]:
        """Return the row's float32 vector. Cancelling removes the row from the queue.

        Raises Busy, Late, BackendFailed, NotReady."""
        return (await self.compute_all([row], deadline_ms=deadline_ms, priority=priority))[0]

    def inspect(self) -> dict[str, float]:
        """Return the current load: rows waiting or running ("rows"), distinct inputs among them
        ("inputs"), large requests that have not queued all rows ("entering") and the estimated ms
        of those rows ("held_ms")."""
        return {
            "rows": len(self._jobs), "inputs": len(self._in_flight),
            "entering": self._entering, "held_ms": self._held_ms,
        }  # fmt: skip

    async def compute_all(
        self, rows: Sequence[TokenRow], *, deadline_ms: float = math.inf, priority: int = 0
    ) -> list[NDArray[np.float32]]:
        """Return the rows' vectors: see ``compute_timed``. float32, one array a row."""
        return (await self.compute_timed(rows, deadline_ms=deadline_ms, priority=priority))[0]

    async def compute_timed(
        self,
        rows: Sequence[TokenRow],
        *,
        deadline_ms: float = math.inf,
        priority: int = 0,
        model: str = "",
    ) -> tuple[list[NDArray[np.float32]], float, float]:
        """Return the rows' vectors, the longest wait and the longest computation of a row, in s.

        The first row that fails cancels the others. Many rows are admitted as one request and are
        queued in turn with other requests' rows; each row ages from the time it was queued.
        """
        found: list[Joined] = []
        asked = Request("", 1, 0.0, deadline_ms, priority, model)
        if len(rows) == 1:
            found = [self._join(rows[0], asked)]
        else:
            self._admit(priority)
        try:
            if not found:
                many = replace(asked, patient=True, weight=1 / len(rows))
                await self._enter_by_turns(rows, found, many)
            jobs = [job for job in found if isinstance(job, PendingRow)]
            if len(jobs) == 1:
                vectors = iter([await asyncio.shield(jobs[0].done)])
            else:
                vectors = iter(await asyncio.gather(*(asyncio.shield(job.done) for job in jobs)))
            return (
                [next(vectors) if isinstance(job, PendingRow) else job for job in found],
                max((job.queued_ms for job in jobs), default=0.0) / 1e3,
                max((job.took_ms for job in jobs), default=0.0) / 1e3,
            )
        finally:
            for job in found:
                if isinstance(job, PendingRow):
                    self._leave(job)

    def _admit(self, priority: int) -> None:
        """Raise Busy if large requests already hold back the admitted amount of work."""
        if self._closing:
            raise NotReady("the server is shutting down")
        work_ms = self._held_ms + self.scheduler.backlog_ms
        if self.full(priority) or (self._entering and work_ms > self.scheduler.max_age_ms):
            raise self.refuse_busy()

    async def _enter_by_turns(
        self, rows: Sequence[TokenRow], found: list[Joined], asked: Request
    ) -> None:
        """Queue the rows as there is room; append each one's pending row or vector to ``found``."""
        shares_ms = [self.scheduler.share_ms(len(row), asked.model) for row in rows]
        left_ms = sum(shares_ms)
        self._entering += 1
        self._held_ms += left_ms
        try:
            for row, share_ms in zip(rows, shares_ms, strict=True):
                while not self._room:
                    await self._turn(found)
                found.append(self._join(row, asked))
                left_ms, self._held_ms = left_ms - share_ms, self._held_ms - share_ms
        finally:
            self._entering -= 1
            self._held_ms -= left_ms
            self._give_turn()
            self._wake.set()

    @property
    def _room(self) -> bool:
        """Whether a row of a large request may be queued.

        Large requests may fill a quarter of the work that is admitted, enough to keep the engine
        busy until the next turn; the rest is for small requests.
        """
        scheduler = self.scheduler
        return not len(scheduler) or (
            len(scheduler) < scheduler.max_queue
            and scheduler.backlog_ms < scheduler.max_age_ms / 12
        )

    async def _turn(self, found: Sequence[Joined]) -> None:
        """Wait, first come first served, until there is room for another row."""
        turn = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        try:
            await turn
        finally:
            if turn in self._turns:
                self._turns.remove(turn)
        for job in found:  # a row that has failed fails the whole request
            if isinstance(job, PendingRow) and job.done.done():
                job.done.result()

    def _give_turn(self) -> None:
        if self._turns and self._room:
            turn = self._turns.popleft()
            if not turn.done():
                turn.set_result(None)

    def _join(self, row: TokenRow, asked: Request) -> Joined:
        """Return the cached vector, the equal row in flight, or a newly queued row.

        asked: priority, deadline and weight; key, length and arrival are set from the row.
        """
        lane = self.lanes[asked.model]
        key = CacheKey.of(lane.revision, f"{asked.model} {lane.engine.head.kind}", row)
        cached = self.cache.get(key)
        if cached is not None:
            self.metrics.cache_hits.inc()
            return cached
        if self.cache.max_nbytes:
            self.metrics.cache_misses.inc()
        job = self._in_flight.get(key) if self.coalesce else None
        if job is None:
            return self._submit(row, key, asked, lane)
        job.awaited_by += 1
        self.scheduler.raise_to(job.key, asked.deadline_ms, asked.priority, asked.weight)
        self.metrics.coalesced.inc()
        return job

    def _leave(self, job: PendingRow) -> None:
        job.awaited_by -= 1
        if job.awaited_by == 0 and not job.done.done() and self.scheduler.cancel(job.key):
            self._forget(job)
            job.done.cancel()
            self.metrics.dropped.inc()
            self._wake.set()  # there may be room for a row of a large request

    async def drain(self) -> None:
        """Refuse new rows, finish the accepted ones, stop the engine's thread."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown(wait=True)

    def _submit(self, row: TokenRow, key: CacheKey, asked: Request, lane: Lane) -> PendingRow:
        if self._closing and not asked.patient:
            raise NotReady("the server is shutting down")
        loop = asyncio.get_running_loop()
        job = PendingRow(next(self._keys), row, key, self.now_ms(), loop.create_future(), lane)
        # If all its requests were cancelled, nobody retrieves the error: suppress asyncio's
        # warning.
        job.done.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            self.scheduler.submit(
                replace(asked, key=job.key, length=len(row), arrival_ms=job.arrival_ms)
            )
        except Overloaded as error:
            raise Busy(str(error), retry_after_s=error.retry_after_ms / 1e3) from error
        self._jobs[job.key] = job
        self._in_flight.setdefault(key, job)
        self._wake.set()
        return job

    def _forget(self, job: PendingRow) -> None:
        self._jobs.pop(job.key, None)
        if self._in_flight.get(job.cache_key) is job:
            del self._in_flight[job.cache_key]

    async def _run(self) -> None:
        """Run batches until closed and empty: take one from the scheduler, compute, set results."""
        while True:
            now_ms = self.now_ms()
            for late in self.scheduler.expire(now_ms):
                self._fail(self._jobs[late.key], Busy("waited beyond the age bound"))
            for late in self.scheduler.overdue(now_ms):
                self._fail(self._jobs[late.key], Late("its deadline passed while it waited"))
            batch = self.scheduler.next(now_ms)
            self._give_turn()
            self.metrics.plan_ms.observe(self.now_ms() - now_ms)
            if batch is not None:
                if self.idle is not None:
                    self.idle.begin()
                await self._execute(batch)
                continue
            self._settle()
            if self._closing and not len(self.scheduler) and not self._entering:
                return
            self._wake.clear()
            await self._wait(now_ms)

    async def _wait(self, now_ms: float) -> None:
        """Wait for an event or the next due batch; measure costs after a long wait."""
        wait_s = (self.scheduler.wake_ms(now_ms) - self.now_ms()) / 1e3
        timeout_s = None if math.isinf(wait_s) else max(wait_s, 0.0)
        idle = self.idle if timeout_s is None else None
        if idle is not None:
            timeout_s = idle.wait_s
        try:
            await asyncio.wait_for(self._wake.wait(), timeout_s)
        except asyncio.TimeoutError:
            shape = None if idle is None else idle.next_shape()
            if idle is not None and shape is not None:
                await self._measure(idle, shape)

    async def _measure(self, idle: IdleMeasuring, shape: Shape) -> None:
        loop = asyncio.get_running_loop()
        try:
            took_ms = await loop.run_in_executor(self._thread, idle.time_ms, shape)
        except Exception as error:  # logged only: no request waits for it
            log.warning("a batch of %d x %d to be timed failed: %s", shape[2], shape[1], error)
            self.idle = None
        else:
            idle.learn(shape, took_ms)

    async def _execute(self, batch: Batch) -> None:
        """Compute a batch; answer the one before it meanwhile."""
        jobs = [self._jobs[r.key] for r in batch.requests]
        begin_ms = self.now_ms()
        for job in jobs:
            job.queued_ms = begin_ms - job.arrival_ms
        computing = asyncio.get_running_loop().run_in_executor(self._thread, self._compute, jobs)
        self._settle()
        try:
            vectors = await computing
        except Exception as error:  # an error of the model fails this batch only
            log.warning("batch of %d up to %d tokens failed: %s", len(jobs), batch.length, error)
            await self._compute_apart(jobs, error)
            return
        self._computed = batch, jobs, vectors, self.now_ms() - begin_ms

    def _settle(self) -> None:
        """Answer the rows of the batch computed last, and learn from it."""
        if self._computed is None:
            return
        (batch, jobs, vectors, took_ms), self._computed = self._computed, None
        for job, vector in zip(jobs, vectors, strict=True):
            self._answer(job, vector, took_ms)
        self.scheduler.complete(batch, took_ms)
        self.metrics.count_batch(batch, took_ms)

    def _compute(self, jobs: Sequence[PendingRow]) -> Rows:
        vectors = jobs[0].lane.engine.run([job.row for job in jobs])
        if len(vectors) != len(jobs):
            raise RuntimeError(f"the engine returned {len(vectors)} rows for {len(jobs)}")
        return vectors

    async def _compute_apart(self, jobs: Sequence[PendingRow], error: Exception) -> None:
        """After a batch failed, compute each row alone once, so that only bad rows fail."""
        loop = asyncio.get_running_loop()
        for job in jobs:
            begin_ms = self.now_ms()
            try:
                if len(jobs) == 1:
                    raise error
                vector = (await loop.run_in_executor(self._thread, self._compute, [job]))[0]
            except Exception as alone:
                self._fail(job, BackendFailed(f"the model failed: {type(alone).__name__}"))
            else:
                self._answer(job, vector, self.now_ms() - begin_ms)

    def _answer(self, job: PendingRow, vector: NDArray[np.float32], took_ms: float) -> None:
        if not np.isfinite(vector).all():
            self._fail(job, BackendFailed("the model returned NaN or infinity for this input"))
            return
        self._forget(job)
        job.took_ms = took_ms
        self.cache.put(job.cache_key, vector)
        self.metrics.count_row(job.queued_ms, took_ms)
        if not job.done.done():
            job.done.set_result(vector)

    def _fail(self, job: PendingRow, refusal: Refusal) -> None:
        self._forget(job)
        if not job.done.done():
            job.done.set_exception(refusal)
