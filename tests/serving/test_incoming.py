"""Bodies that would cost far more than they weigh, and texts that wait to be tokenised."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from tests.serving.conftest import sleeping_service
from tests.serving.test_app import client_of
from turbotx.serving.bodies import BodyMemory, Shape
from turbotx.serving.interruption import Interruption
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
    with pytest.raises(TooLarge, match="more elements than 8 inputs"):
        Shape(8, 100).count(json.dumps(body).encode())


@pytest.mark.parametrize(
    "text", ["[{,:" * 20_000, '"' * 5000, "\\" * 5001, '\\"[' * 5000, 'a\\\\"[,'], ids=range(5)
)
def test_what_stands_in_a_text_is_not_counted(text):
    body = json.dumps({"inputs": [text, text]}).encode()
    Shape(8, 100).count(body)
    for nbytes in (1, 2, 3, 7, 1000):  # however it comes apart
        shape = Shape(8, 100)
        for begin in range(0, min(len(body), 9000), nbytes):
            shape.count(body[begin : begin + nbytes])


def test_the_server_refuses_them_before_decoding():
    with client_of(sleeping_service(max_client_batch=8)) as client:
        answer = client.post("/embed", json={"inputs": [[1]] * 20_000})
        assert answer.status_code == 413 and "more elements" in answer.json()["error"]
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


def test_a_flood_of_bodies_costs_the_largest_and_no_more_memory_than_said():
    memory, ended = BodyMemory(1000), []

    async def life():
        with memory.hold() as small, memory.hold() as large, memory.hold() as whole:
            arriving = [asyncio.create_task(arrive(held)) for held in (small, large)]
            await asyncio.sleep(0)
            memory.charge(whole, 300)  # has been read: it stays
            memory.charge(large, 500)
            memory.charge(small, 150)
            assert memory.nbytes == 950
            await asyncio.sleep(0)
            assert not ended
            memory.charge(small, 100)
            assert memory.nbytes == 550
            await asyncio.wait(arriving[1:])
            assert ended == [large] and not arriving[0].done()
            with pytest.raises(Busy, match="too many request bodies"):
                memory.charge(small, 701)
            assert memory.nbytes == 300
        assert memory.nbytes == 0

    async def arrive(held):
        with pytest.raises(Busy, match="too many request bodies"), Interruption() as held.reading:
            await asyncio.sleep(60)
        ended.append(held)

    asyncio.run(life())


def test_the_one_that_is_too_large_beside_others_is_told_so():
    service = sleeping_service(max_body_nbytes=100_000)
    service.bodies.most = 50_000
    with client_of(service) as client:
        answer = client.post("/embed", content=b" " * 90_000)
        assert answer.status_code == 429 and "bodies" in answer.json()["error"]
        assert int(answer.headers["retry-after"]) == 1
        assert client.post("/embed", json={"inputs": "w1"}).status_code == 200
        assert service.bodies.nbytes == 0


def test_large_bodies_and_answers_are_as_small_ones(monkeypatch):
    monkeypatch.setattr("turbotx.serving.routes.MANY_NUMBERS", 1000)
    with client_of(sleeping_service()) as client:
        texts = [f"w{i} w{i % 7}" for i in range(200)]
        body = {"inputs": texts, "normalize": False}
        assert len(json.dumps({**body, "inputs": [t + " " * 400 for t in texts]})) > 65_536
        many = client.post(
            "/embed", content=json.dumps({**body, "inputs": [t + " " * 400 for t in texts]})
        ).json()
        for i in (0, 77, 199):
            alone = client.post("/embed", json={**body, "inputs": texts[i]}).json()
            assert many[i] == alone[0]
        found = client.post("/v1/embeddings", json={"input": texts}).json()["data"]
        one = client.post("/v1/embeddings", json={"input": texts[5]}).json()["data"]
        assert found[5]["embedding"] == one[0]["embedding"] and len(found) == len(texts)
