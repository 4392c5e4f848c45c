"""Small stand-ins: a word tokenizer, engines that sleep or fail, a server on loopback."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

pytest.importorskip("starlette")
pytest.importorskip("tokenizers")

import uvicorn

try:  # what Starlette's test client uses
    import httpx2 as httpx
except ImportError:
    import httpx
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from benchmarks.sleep_engine import SleepEngine
from turbotx.serving.app import create_app
from turbotx.serving.connections import ConnectionLimits, make_protocol
from turbotx.serving.cost import CostTable
from turbotx.serving.engine import Head
from turbotx.serving.listener import GracefulServer
from turbotx.serving.model_files import LoadedModel, ModelInfo
from turbotx.serving.service import Service
from turbotx.serving.settings import Settings
from turbotx.serving.tokens import TextTokenizer

__all__ = ["httpx"]
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(200)))


def word_tokenizer(max_length=32):
    """One token a word, and [CLS], [SEP] round it."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return TextTokenizer(tokenizer, max_length)


def fast_costs(max_length=32, max_batch=8, scale=1.0):
    return CostTable.from_function(lambda n, b: scale * (1 + 0.002 * n * b), max_length, max_batch)


def stand_in(engine=None, head=None, max_length=32):
    head = head or Head("embedding", normalize=True)
    engine = engine or SleepEngine(fast_costs(max_length), head=head)
    info = ModelInfo("stand-in", "r1", "float32", max_length, 8, engine.head)
    costs = getattr(engine, "costs", None)
    return LoadedModel(engine, word_tokenizer(max_length), info, costs)


@contextlib.contextmanager
def listening(service, receive_s=20.0, most=1000, application=create_app, nbytes=8 << 20):
    """The service behind uvicorn on a free loopback port; yields its base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    limits = ConnectionLimits(receive_s, most, nbytes)
    config = uvicorn.Config(
        application(service), port=port, log_config=None, access_log=False,
        http=make_protocol(limits), ws="none",
    )  # fmt: skip
    server = GracefulServer(config, service, limits)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started and service.state == "ready")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


def wait_until(condition, limit_s=90.0):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def sleeping_service(costs=None, **settings):
    defaults = {"max_batch": 8, "max_batch_tokens": None, "cache_nbytes": 0}
    model = stand_in(SleepEngine(costs or fast_costs(), head=Head("embedding", normalize=True)))
    return Service(model, Settings(**{**defaults, **settings}))


@pytest.fixture
def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
