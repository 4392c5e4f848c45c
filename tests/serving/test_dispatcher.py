"""Real time: batching, coalescing, cancelling, failing batches, draining."""

from __future__ import annotations

import asyncio
import math
import threading

import numpy as np
import pytest

from tests.serving.conftest import fast_costs
from turbotx.serving.cache import ResponseCache
from turbotx.serving.dispatcher import Dispatcher
from turbotx.serving.engine import Head
from turbotx.serving.metrics import Metrics
from turbotx.serving.refusals import BackendFailed, Busy, NotReady
from turbotx.serving.scheduler import Scheduler
from turbotx.serving.tokens import TokenRow


class GatedEngine:
    """Runs a batch when the test opens the gate; fails on token 13."""

    head = Head("embedding")

    def __init__(self, opened=True):
        self.gate = threading.Event()
        self.batches = []
        if opened:
            self.gate.set()

    packs = False

    def run(self, rows):
        assert self.gate.wait(20)
        self.batches.append([row.ids for row in rows])
        if any(13 in row.ids for row in rows):
            raise RuntimeError("unlucky")
        return np.array([[row.ids[0], len(row)] for row in rows], dtype=np.float32)

    def figures(self):
        return {}


def row(first, length=3):
    return TokenRow((first,) * length)


def in_loop(test, engine, **options):
    async def go():
        costs = fast_costs(scale=options.pop("scale", 1.0))
        age_ms = options.pop("max_age_ms", math.inf)
        scheduler = Scheduler(costs, max_age_ms=age_ms, max_queue=options.pop("max_queue", 100))
        cache = ResponseCache(options.pop("cache_nbytes", 0))
        dispatcher = Dispatcher(engine, scheduler, cache, Metrics(), **options)
        dispatcher.start()
        try:
            await asyncio.wait_for(test(dispatcher), 20)
        finally:
            engine.gate.set()
            await dispatcher.drain()

    asyncio.run(go())


async def first_is_running(dispatcher):
    """Occupy the engine, so that what follows waits together."""
    task = asyncio.create_task(dispatcher.compute(row(1)))
    while dispatcher.scheduler.waiting or not dispatcher.inspect()["rows"]:
        await asyncio.sleep(0.001)
    return task


def test_those_who_wait_together_run_together():
    engine = GatedEngine(opened=False)

    async def test(dispatcher):
        first = await first_is_running(dispatcher)
        rest = [asyncio.create_task(dispatcher.compute(row(n))) for n in (2, 4, 5)]
        await asyncio.sleep(0)
        engine.gate.set()
        answers = await asyncio.gather(first, *rest)
        assert [a.tolist() for a in answers] == [[n, 3] for n in (1, 2, 4, 5)]
        assert len(engine.batches) == 2 and len(engine.batches[1]) == 3

    in_loop(test, engine)


def test_a_batch_is_answered_while_the_next_one_runs():
    engine = GatedEngine(opened=False)

    async def check(dispatcher):
        first = await first_is_running(dispatcher)
        second = asyncio.create_task(dispatcher.compute(row(2)))
        while not dispatcher.scheduler.waiting:
            await asyncio.sleep(0.001)
        engine.gate = threading.Event()  # of the second batch; the first waits for the old one
        engine.first_gate.set()
        assert (await first).tolist() == [1, 3] and not second.done()
        engine.gate.set()
        assert (await second).tolist() == [2, 3]

    engine.first_gate = engine.gate
    in_loop(check, engine)


def test_equal_rows_in_flight_are_computed_once():
    engine = GatedEngine(opened=False)

    async def test(dispatcher):
        first = await first_is_running(dispatcher)
        same = [asyncio.create_task(dispatcher.compute(row(7))) for _ in range(5)]
        await asyncio.sleep(0)
        assert len(dispatcher.scheduler) == 1
        same[0].cancel()  # the others still want it
        engine.gate.set()
        answers = await asyncio.gather(first, *same[1:])
        assert all(a.tolist() == [7, 3] for a in answers[1:])
        assert engine.batches == [[(1, 1, 1)], [(7, 7, 7)]]

    in_loop(test, engine)


def test_without_coalescing_each_is_computed():
    engine = GatedEngine(opened=False)

    async def test(dispatcher):
        first = await first_is_running(dispatcher)
        same = [asyncio.create_task(dispatcher.compute(row(7))) for _ in range(2)]
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(first, *same)
        assert sum(map(len, engine.batches)) == 3

    in_loop(test, engine, coalesce=False)


def test_a_row_that_nobody_awaits_leaves_the_queue():
    engine = GatedEngine(opened=False)

    async def test(dispatcher):
        first = await first_is_running(dispatcher)
        gone = asyncio.create_task(dispatcher.compute(row(9)))
        await asyncio.sleep(0)
        assert len(dispatcher.scheduler) == 1
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert len(dispatcher.scheduler) == 0
        engine.gate.set()
        await first
        assert engine.batches == [[(1, 1, 1)]]
        assert not any(dispatcher.inspect().values())

    in_loop(test, engine)


def test_a_failing_row_does_not_fail_its_batch():
    engine = GatedEngine(opened=False)

    async def test(dispatcher):
        first = await first_is_running(dispatcher)
        mixed = [asyncio.create_task(dispatcher.compute(row(n))) for n in (2, 13, 4)]
        await asyncio.sleep(0)
        engine.gate.set()
        await first
        good, bad, also = await asyncio.gather(*mixed, return_exceptions=True)
        assert good.tolist() == [2, 3] and also.tolist() == [4, 3]
        assert isinstance(bad, BackendFailed) and "RuntimeError" in str(bad)
        assert (await dispatcher.compute(row(5))).tolist() == [5, 3]

    in_loop(test, engine)


def test_not_a_number_is_a_failure():
    engine = GatedEngine()
    engine.run = lambda rows: np.full((len(rows), 2), np.nan, dtype=np.float32)

    async def test(dispatcher):
        with pytest.raises(BackendFailed, match="NaN"):
            await dispatcher.compute(row(5))

    in_loop(test, engine)


def test_cached_answers_skip_the_queue():
    engine = GatedEngine()

    async def test(dispatcher):
        for _ in range(3):
            assert (await dispatcher.compute(row(5))).tolist() == [5, 3]
        assert len(engine.batches) == 1

    in_loop(test, engine, cache_nbytes=10_000)


def test_a_group_that_does_not_fit_is_refused_whole():
    engine = GatedEngine(opened=False)

    async def test(dispatcher):
        first = await first_is_running(dispatcher)
        waiting = [asyncio.create_task(dispatcher.compute(row(n))) for n in (6, 7)]
        await asyncio.sleep(0)
        with pytest.raises(Busy) as caught:
            await dispatcher.compute_all([row(n) for n in (2, 3, 4, 5)])
        assert caught.value.retry_after_s > 0
        assert len(dispatcher.scheduler) == 2
        engine.gate.set()
        await asyncio.gather(first, *waiting)

    in_loop(test, engine, max_queue=2)


def test_many_rows_enter_by_turns_and_leave_room_for_one():
    engine = GatedEngine(opened=False)

    async def test(dispatcher):
        scheduler = dispatcher.scheduler
        rows = [row(n) for n in range(20, 120)]
        many = [asyncio.create_task(dispatcher.compute_all(rows)) for _ in range(3)]
        while len(scheduler) < 6:
            await asyncio.sleep(0.001)
        assert 5 < len(scheduler) < 12  # a twelfth of the bound in work, and no more
        refused = await asyncio.gather(*many[1:], return_exceptions=True)
        assert all(isinstance(error, Busy) and error.retry_after_s > 4 for error in refused)
        alone = asyncio.create_task(dispatcher.compute(row(1)))
        engine.gate.set()
        assert (await alone).tolist() == [1, 3]
        assert len(engine.batches) < 6
        assert [int(v[0]) for v in await many[0]] == list(range(20, 120))
        under_way = dispatcher.inspect()
        assert under_way["held_ms"] == pytest.approx(0, abs=1e-6) and not under_way["entering"]

    # 100 rows are estimated to take 13 s; the engine answers at once.
    in_loop(test, engine, coalesce=False, scale=1e3, max_age_ms=9e3)


def test_many_rows_whose_client_leaves_make_way():
    engine = GatedEngine(opened=False)

    async def test(dispatcher):
        first = await first_is_running(dispatcher)
        many = asyncio.create_task(dispatcher.compute_all([row(n) for n in range(20, 60)]))
        other = asyncio.create_task(dispatcher.compute_all([row(n) for n in range(60, 70)]))
        await asyncio.sleep(0.01)
        many.cancel()
        await asyncio.gather(many, return_exceptions=True)
        engine.gate.set()
        assert len(await other) == 10 and (await first).tolist() == [1, 3]
        under_way = dispatcher.inspect()
        assert under_way["held_ms"] == pytest.approx(0, abs=1e-6) and not under_way["entering"]

    in_loop(test, engine, scale=1e3, max_age_ms=6e4)


def test_draining_answers_many_rows_that_were_accepted():
    engine = GatedEngine(opened=False)

    async def test(dispatcher):
        many = asyncio.create_task(dispatcher.compute_all([row(n) for n in range(20, 60)]))
        while len(dispatcher.scheduler) < 4:
            await asyncio.sleep(0.001)
        drained = asyncio.create_task(dispatcher.drain())
        await asyncio.sleep(0)
        with pytest.raises(NotReady):
            await dispatcher.compute_all([row(8), row(9)])
        engine.gate.set()
        assert len(await many) == 40
        await drained

    in_loop(test, engine, scale=1e3, max_age_ms=9e3)


def test_draining_answers_what_was_accepted_and_accepts_no_more():
    engine = GatedEngine(opened=False)

    async def test(dispatcher):
        first = await first_is_running(dispatcher)
        waiting = [asyncio.create_task(dispatcher.compute(row(n))) for n in (2, 3)]
        await asyncio.sleep(0)
        drained = asyncio.create_task(dispatcher.drain())
        await asyncio.sleep(0)
        with pytest.raises(NotReady):
            await dispatcher.compute(row(8))
        engine.gate.set()
        await drained
        assert [(await t).tolist() for t in (first, *waiting)] == [[1, 3], [2, 3], [3, 3]]
        assert not dispatcher.alive

    in_loop(test, engine)
