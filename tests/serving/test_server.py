"""A listening server: real sockets, real clients, signals."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from tests.serving.conftest import (
    fast_costs,
    httpx,
    listening,
    sleeping_service,
    stand_in,
    wait_until,
)
from tests.serving.test_app import classifier
from turbotx.cli.models import ModelError
from turbotx.cli.serve import serve_models, wait_briefly
from turbotx.errors import DeviceError, OptionsError
from turbotx.serving.engine import Head
from turbotx.serving.generation.model import load_generator
from turbotx.serving.model_files import load_model
from turbotx.serving.served import ModelFailed
from turbotx.serving.server import run, serve
from turbotx.serving.settings import Settings, SettingsError


def test_a_client_that_leaves_is_dropped_from_the_queue():
    service = sleeping_service(fast_costs(scale=500.0))
    with listening(service) as url:

        async def leave():
            async with httpx.AsyncClient() as client:

                def post(word):
                    return asyncio.create_task(client.post(f"{url}/embed", json={"inputs": word}))

                tasks = [post("w0")]
                dispatcher = service.dispatcher
                while not dispatcher.inspect()["rows"] or len(dispatcher.scheduler):
                    await asyncio.sleep(0.005)  # until it runs, so that the others wait
                tasks += [post("w1"), post("w2")]
                while len(service.dispatcher.scheduler) < 2:
                    await asyncio.sleep(0.005)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(leave())
        wait_until(lambda: len(service.dispatcher.scheduler) == 0)
        wait_until(lambda: "turbotx_dropped_total 0.0" not in service.metrics.render().decode())


def test_overload_is_429_with_retry_after_and_the_accepted_are_answered():
    service = sleeping_service(fast_costs(scale=20.0), max_queue=10)
    with listening(service) as url:

        async def flood():
            limits = httpx.Limits(max_connections=200)
            async with httpx.AsyncClient(limits=limits, timeout=20) as client:
                posts = [client.post(f"{url}/embed", json={"inputs": f"w{i}"}) for i in range(60)]
                return await asyncio.gather(*posts)

        answers = asyncio.run(flood())
    statuses = {a.status_code for a in answers}
    assert statuses == {200, 429}
    refused = next(a for a in answers if a.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error_type"] == "overloaded"


def test_the_openai_client():
    openai = pytest.importorskip("openai")
    with listening(sleeping_service(api_keys=("k",))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
        found = client.embeddings.create(model="stand-in", input=["w0", "w1 w2"])
        assert [len(d.embedding) for d in found.data] == [8, 8]
        assert found.usage.prompt_tokens == 7
        assert client.models.list().data[0].id == "stand-in"
        with pytest.raises(openai.UnprocessableEntityError, match="empty"):
            client.embeddings.create(model="stand-in", input="")
        wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.embeddings.create(model="stand-in", input="w0")


def test_hugging_faces_client(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # for the loopback alone
    with listening(sleeping_service(api_keys=("k",))) as url:
        client = hub.InferenceClient(model=url, token="k", timeout=60)
        found = client.feature_extraction("w1 w2", normalize=False, truncate=True)
        assert found.tolist() == [[2, 5, 6, 3, 2, 5, 6, 3]]
        with pytest.raises(hub.errors.HfHubHTTPError, match="422"):
            client.feature_extraction("w1", prompt_name="query")
        client = hub.InferenceClient(model=f"{url}/similarity", token="k", timeout=60)
        assert client.sentence_similarity("w1", other_sentences=["w1"]) == [pytest.approx(1)]
    with listening(classifier("a", "b")) as url:
        client = hub.InferenceClient(model=url, timeout=60)
        best = client.text_classification("w1 w2")  # of one text it takes the first class
        assert best.label == "a" and 0.9 < best.score < 1


PROGRAM = """
    import logging, sys
    from benchmarks.sleep_engine import SleepEngine
    from tests.serving.conftest import fast_costs, stand_in
    from turbotx.serving.engine import Head
    from turbotx.serving.logs import log_as_json
    from turbotx.serving.server import run
    from turbotx.serving.settings import Settings
    log_as_json()
    model = stand_in(SleepEngine(fast_costs(scale=300.0), head=Head("embedding")))
    settings = Settings(max_batch=8, max_batch_tokens=None)
    run(model, settings, host="127.0.0.1", port=int(sys.argv[1]))
"""


def test_told_to_stop_it_answers_what_it_accepted(unused_port):
    port = str(unused_port)
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), port]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True)
    url, answers = f"http://127.0.0.1:{port}", []

    def is_ready():
        try:
            return httpx.get(f"{url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    def ask(i):
        answers.append(httpx.post(f"{url}/embed", json={"inputs": f"w{i}"}, timeout=20))

    half = b"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-length: 500\r\n\r\n{"
    try:
        wait_until(is_ready)
        unfinished = socket.create_connection(("127.0.0.1", unused_port))
        unfinished.sendall(half)
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: 'te_request_count{method="/embed"} 5.0' in metrics_of(url))
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(20)
        logged = process.communicate(timeout=20)[1]
    finally:
        process.kill()
    assert [a.status_code for a in answers] == [200] * 4
    assert unfinished.recv(12) == b"HTTP/1.1 503"
    unfinished.close()
    assert process.returncode == 0
    lines = [json.loads(line) for line in logged.splitlines()]
    assert sum(line["event"] == "request" and line["status"] == 200 for line in lines) == 4


PREPARING = """
    import sys, time
    from tests.serving.conftest import stand_in
    from turbotx.serving.engine import Head
    from turbotx.serving.server import run
    from turbotx.serving.settings import Settings

    class Slow:
        head, packs = Head("embedding"), False
        def run(self, rows):
            print("begun", flush=True)
            time.sleep(600)

    run(stand_in(Slow()), Settings(), host="127.0.0.1", port=int(sys.argv[1]))
"""


def test_told_to_stop_while_it_prepares_it_does_not_finish_that(unused_port):
    command = [sys.executable, "-c", textwrap.dedent(PREPARING), str(unused_port)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    try:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def test_an_empty_key_in_the_environment_does_not_open_the_door(monkeypatch):
    monkeypatch.setenv("TURBOTX_API_KEY", "")
    with pytest.raises(ModelError, match="TURBOTX_API_KEY is empty"):
        serve_models(["no/such/model"], api_keys=(), api_key_file=None)


@pytest.mark.parametrize(
    "raised, said",
    [("no memory\nat all", "no memory"), ("g++ failed:\nno space", "g++ failed: no space")],
)
def test_a_model_that_cannot_run_ends_the_server(unused_port, raised, said):
    class Broken:
        head, packs = Head("embedding"), False

        def run(self, rows):
            raise RuntimeError(raised)

        def figures(self):
            return {}

    with pytest.raises(
        ModelFailed, match=rf"^stand-in cannot run: RuntimeError: {re.escape(said)}$"
    ):
        run(stand_in(Broken()), Settings(), host="127.0.0.1", port=unused_port)


def test_a_port_in_use_is_said_before_the_model_is_loaded(unused_port, monkeypatch):
    monkeypatch.setattr("turbotx.serving.server.log_as_json", lambda level: None)  # of the process
    with socket.socket() as other:
        other.bind(("127.0.0.1", unused_port))
        other.listen()
        with pytest.raises(SettingsError, match=f"port {unused_port}: .*in use; give another port"):
            serve(["no/such/model"], port=unused_port)
    with pytest.raises(SettingsError, match="cannot listen on"):
        serve(["no/such/model"], host="256.0.0.1")


@pytest.mark.parametrize(
    "device, error, said",
    [
        ("gpu", OptionsError, "'gpu' is none that PyTorch knows"),
        ("mps", OptionsError, "runs on CPUs and NVIDIA GPUs"),
        ("cuda", DeviceError, "PyTorch sees no CUDA device"),
    ],
)
@pytest.mark.parametrize("load", [load_model, load_generator])
def test_a_device_that_is_not_here_is_refused(load, device, error, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=said):
        load("no/such/model", device=device)


@pytest.mark.parametrize("port", [-1, 65_536, 99_999])
def test_a_port_that_does_not_exist_is_not_taken_for_another(port, monkeypatch):
    monkeypatch.setattr("turbotx.serving.server.log_as_json", lambda level: None)  # of the process
    with pytest.raises(SettingsError, match=f"port {port} is not in 0 to 65535"):
        serve(["no/such/model"], port=port)


def metrics_of(url):
    return httpx.get(f"{url}/metrics").text


def test_openmp_is_told_to_wait_briefly_before_torch_is_loaded():
    code = "import turbotx.cli.serve, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    for given, wanted in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        wait_briefly(given)
        assert given == {"GOMP_SPINCOUNT": wanted}
    chosen = {"OMP_WAIT_POLICY": "active"}
    wait_briefly(chosen)
    assert chosen == {"OMP_WAIT_POLICY": "active"}
