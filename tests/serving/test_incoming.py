"""Bodies that would cost far more than they weigh, and texts that wait to be tokenised."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from tests.serving.conftest import sleeping_service
from tests.serving.test_app import client_of
from turbotx.serving.incoming import check_shape
from turbotx.serving.refusals import Busy, TooLarge
from turbotx.serving.tokenizer_pool import SHORT, TokenizerPool


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": [[1]] * 20_000},
        {"inputs": list(range(20_000))},
        {"inputs": ["a"] * 20_000},
        {"inputs": "w1", "more": [{}] * 20_000},
        [[[]]] * 20_000,
    ],
)
def test_bodies_of_very_many_parts_are_refused_unread(body):
    with pytest.raises(TooLarge, match="far more parts than 8 inputs"):
        check_shape(json.dumps(body).encode(), 8, 100)


@pytest.mark.parametrize(
    "text", ["[{,:" * 20_000, '"' * 5000, "\\" * 5001, '\\"[' * 5000, 'a\\\\"[,'], ids=range(5)
)
def test_what_stands_in_a_text_is_not_counted(text):
    check_shape(json.dumps({"inputs": [text, text]}).encode(), 8, 100)


def test_the_server_refuses_them_before_decoding():
    with client_of(sleeping_service(max_client_batch=8)) as client:
        answer = client.post("/embed", json={"inputs": [[1]] * 20_000})
        assert answer.status_code == 413 and "far more parts" in answer.json()["error"]
        many = client.post("/tokenize", json={"inputs": ["w1 " * 10_000] * 7})
        assert many.status_code == 413 and "tokens" in many.json()["error"]


def test_short_texts_do_not_wait_behind_long_ones_and_long_ones_are_bounded():
    async def life():
        pool, gate = TokenizerPool(1, 3 * SHORT), threading.Event()
        long = [asyncio.create_task(pool.run(SHORT + 1, lambda: gate.wait(20))) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert await pool.run(10, lambda: "short") == "short"
        with pytest.raises(Busy, match="too much text"):
            await pool.run(2 * SHORT, lambda: "long")
        gate.set()
        assert await asyncio.gather(*long) == [True, True]
        while pool.characters:
            await asyncio.sleep(0.001)
        assert await pool.run(100 * SHORT, lambda: "alone") == "alone"  # where nothing waits
        pool.shutdown()

    asyncio.run(life())
