"""The service between HTTP and the queue: costs kept, states, figures."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from tests.serving.conftest import fast_costs, stand_in
from turbotx.serving.cost import CostTable
from turbotx.serving.engine import Head
from turbotx.serving.policies import Aged, Fifo
from turbotx.serving.refusals import NotReady
from turbotx.serving.scheduler import Hungry, Lazy
from turbotx.serving.service import ModelFailed, Scope, Service
from turbotx.serving.settings import Settings


class Instant:
    """Answers zeros at once, or fails when told to."""

    head = Head("embedding")

    def __init__(self, broken=False):
        self.broken, self.runs = broken, 0

    def run(self, rows):
        self.runs += 1
        if self.broken:
            raise RuntimeError("no memory")
        return np.zeros((len(rows), 2), dtype=np.float32)

    def figures(self):
        return {"plans": 3.0}


def settings(**more):
    return Settings(**{"max_batch": 4, "max_batch_tokens": None, **more})


def test_measured_costs_are_kept_and_used_again(tmp_path):
    async def life(engine):
        service = Service(stand_in(engine), settings(cost_folder=tmp_path))
        await service.start()
        rows = await service.encode(["w0", "w1 w2"])
        assert len(await service.compute(rows, Scope())) == 2
        await service.stop()
        return engine.runs

    measuring = asyncio.run(life(Instant()))
    (path,) = tmp_path.glob("costs-*.json")
    assert CostTable.load(path).observations == 1
    assert asyncio.run(life(Instant())) == 2 < measuring  # warming up, and the batch
    assert CostTable.load(path).observations == 2


def test_an_engine_that_cannot_run_makes_the_service_fail():
    async def life():
        service = Service(stand_in(Instant(broken=True)), settings())
        with pytest.raises(ModelFailed, match="stand-in cannot run: RuntimeError: no memory"):
            await service.start()
        assert service.state == "failed"
        with pytest.raises(NotReady, match="failed"):
            service.dispatcher  # noqa: B018

    asyncio.run(life())


def test_figures_name_queue_cache_and_engine():
    async def life():
        service = Service(stand_in(Instant()), settings(), fast_costs())
        assert service.figures() == {"ready": 0.0, "engine_plans": 3.0}
        await service.start()
        found = service.figures()
        assert found["ready"] == 1 and {"backlog_ms", "cache_nbytes", "cache_entries"} <= set(found)
        await service.stop()

    asyncio.run(life())


def test_settings_reach_the_scheduler():
    service = Service(stand_in(Instant()), settings(max_age_ms=70.0, lazy_ms=9.0))
    scheduler = service.make_scheduler(fast_costs())
    assert scheduler.policy == Aged(max_age_ms=70.0)
    assert scheduler.trigger == Lazy(9.0, 4, None)
    service = Service(stand_in(Instant()), settings(policy="fifo"))
    scheduler = service.make_scheduler(fast_costs())
    assert scheduler.policy == Fifo() and scheduler.trigger == Hungry()
