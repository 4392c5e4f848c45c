"""The service between HTTP and the queue: costs kept, states, figures."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from benchmarks.sleep_engine import SleepEngine
from tests.serving.conftest import fast_costs, stand_in
from turbotx.serving.cost import CostTable
from turbotx.serving.engine import Head
from turbotx.serving.policies import Aged, Fifo
from turbotx.serving.refusals import NotReady
from turbotx.serving.routes import describe_service
from turbotx.serving.scheduler import Hungry, Lazy
from turbotx.serving.served import ModelFailed
from turbotx.serving.service import Scope, Service
from turbotx.serving.settings import Settings, SettingsError
from turbotx.serving.token_costs import TokenCosts
from turbotx.serving.token_policies import FifoTokens


class Instant:
    """Answers zeros at once, or fails when told to."""

    head = Head("embedding")

    def __init__(self, broken=False):
        self.broken, self.runs = broken, 0

    packs = False

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


def test_policies_that_arrange_padding_need_it():
    assert Settings().wanted_padding == "auto" and Settings(policy="dp").wanted_padding == "padded"
    with pytest.raises(SettingsError, match="'dp' arranges padding"):
        Settings(policy="dp", padding="packed")
    packed = stand_in(SleepEngine(TokenCosts.from_rates(1.0, 0.01, 0.0, 32, 512)))
    service = Service(packed, settings(policy="fifo"))
    assert isinstance(service.make_scheduler(packed.engine.costs).policy, FifoTokens)
    with pytest.raises(SettingsError, match="'dp' needs padding 'padded'"):
        Service(packed, settings(policy="dp")).make_scheduler(packed.engine.costs)


def test_info_says_whether_batches_are_padded():
    costs = TokenCosts.from_rates(1.0, 0.01, 0.0, 32, 512)
    assert (
        describe_service(Service(stand_in(SleepEngine(costs)), settings()))["padding"] == "packed"
    )
    assert describe_service(Service(stand_in(), settings()))["padding"] == "padded"


def test_costs_without_padding_are_kept_apart(tmp_path):
    async def life(engine):
        service = Service(stand_in(engine), settings(cost_folder=tmp_path))
        await service.start()
        rows = await service.encode(["w0", "w1 w2"])
        await service.compute(rows, Scope())
        batches = service.metrics.registry.get_sample_value("turbotx_padding_ratio_sum")
        await service.stop()
        return batches

    packed = Instant()
    packed.packs = True
    for engine in (Instant(), packed):
        assert asyncio.run(life(engine)) >= 1
    names = sorted(path.name for path in tmp_path.glob("costs-*.json"))
    assert len(names) == 2 and sum("packed" in name for name in names) == 1
    runs = packed.runs
    asyncio.run(life(packed))
    assert packed.runs - runs <= 3  # a warm-up and what was asked: nothing is measured again
