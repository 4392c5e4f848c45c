"""An idle server measures again; who comes meanwhile is not kept waiting for long."""

from __future__ import annotations

import asyncio
import math

import numpy as np

from tests.serving.test_dispatcher import GatedEngine, row
from turbotx.serving.cache import ResponseCache
from turbotx.serving.cost import CostTable
from turbotx.serving.dispatcher import Dispatcher
from turbotx.serving.idle import ROUNDS, IdleMeasuring
from turbotx.serving.metrics import Metrics
from turbotx.serving.scheduler import Scheduler

LENGTHS, BATCHES = [1, 16, 32], [1, 4, 8]


def true_ms(length, batch):
    return 2 + 0.05 * length * batch


def table_of(factor):
    return CostTable(LENGTHS, BATCHES, [[factor * true_ms(n, b) for b in BATCHES] for n in LENGTHS])


def measuring(table, longest_ms=100.0, **options):
    return IdleMeasuring({"": None}, {"": table}, {"": 7}, longest_ms, **options)


def test_a_wrong_table_is_right_after_an_idle_time():
    for factor in (3.0, 1 / 3):
        table, ended = table_of(factor), []
        idle = measuring(table, finished=lambda e=ended: e.append(1))
        asked = 0
        while (shape := idle.next_shape()) is not None:
            idle.learn(shape, true_ms(*shape[1:]))
            asked += 1
        assert asked <= ROUNDS * len(LENGTHS) * len(BATCHES) and ended == [1]
        right = np.array([[true_ms(n, b) for b in BATCHES] for n in LENGTHS])
        assert np.abs(np.log(table.grid_ms / right)).max() < math.log(1.35)
        assert idle.wait_s is None
        idle.begin()
        assert idle.wait_s == idle.first_s and idle.next_shape() is None  # all are known


def test_dear_shapes_and_those_that_never_run_are_left_out():
    asked = set()
    idle = measuring(table_of(1.0), longest_ms=8.0, max_tokens=64)
    while (shape := idle.next_shape()) is not None:
        asked.add(shape[1:])
        idle.learn(shape, true_ms(*shape[1:]))
    assert asked == {(n, b) for n in LENGTHS for b in BATCHES
                     if true_ms(n, b) <= 8 and n * b <= 64}  # fmt: skip
    assert (32, 8) not in asked


def run_idle(engine, test):
    async def go():
        table = table_of(1.0)
        idle = IdleMeasuring({"": engine}, {"": table}, {"": 7}, 100.0, first_s=0.01)
        dispatcher = Dispatcher(engine, Scheduler(table), ResponseCache(0), Metrics(), idle=idle)
        dispatcher.start()
        await asyncio.wait_for(test(dispatcher, table), 20)
        await dispatcher.drain()

    asyncio.run(go())


def test_the_dispatcher_measures_while_nobody_asks():
    engine = GatedEngine()

    async def test(dispatcher, table):
        while table.observations < 3:
            await asyncio.sleep(0.01)
        assert (await dispatcher.compute(row(5))).tolist() == [5, 3]

    run_idle(engine, test)
    made_up = [batch for batch in engine.batches if batch[0][0] == 7]
    assert len(made_up) >= 3 and [(5, 5, 5)] in engine.batches


def test_an_engine_that_fails_is_measured_no_more():
    engine = GatedEngine()

    async def test(dispatcher, table):
        engine.run, works = None, engine.run
        while dispatcher.idle is not None:
            await asyncio.sleep(0.01)
        engine.run = works
        assert (await dispatcher.compute(row(5))).tolist() == [5, 3]

    run_idle(engine, test)
