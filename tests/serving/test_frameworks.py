"""LangChain, LlamaIndex and Haystack: what they send, and their own packages where there are any.

The packages pin other releases of what the tests need, so that they live in an environment of
their own, named by TURBOTX_FRAMEWORKS: see docs/development.md.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.serving.conftest import listening, sleeping_service
from tests.serving.test_app import classifier, client_of

TEXTS = ["w1", "w2 w3 w4"]


@pytest.fixture(scope="module")
def client():
    with client_of(sleeping_service()) as client:
        yield client


@pytest.mark.parametrize(
    "path, body",
    [  # LangChain's and LlamaIndex's OpenAI, Haystack's, LlamaIndex's and Haystack's for TEI
        ("/v1/embeddings", {"model": "m", "input": TEXTS, "encoding_format": "base64"}),
        ("/v1/embeddings", {"model": "m", "input": TEXTS, "encoding_format": "float"}),
        ("/embed", {"inputs": TEXTS, "truncate": True}),
        ("/embed", {"inputs": TEXTS, "truncate": True, "normalize": False}),
    ],
)
def test_the_bodies_that_they_send(client, path, body):
    answer = client.post(path, json=body).json()
    if path == "/v1/embeddings":
        answer = [item["embedding"] for item in answer["data"]]
    if body.get("encoding_format") == "base64":
        answer = [np.frombuffer(base64.b64decode(text), "<f4").tolist() for text in answer]
    plain = client.post("/embed", json={"inputs": TEXTS}).json()
    if "normalize" in body:
        answer = [np.array(vector) / np.linalg.norm(vector) for vector in answer]
    assert np.abs(np.array(answer) - plain).max() < 1e-6


def test_the_body_of_their_rankers():
    with client_of(classifier("score")) as client:
        for more in ({"raw_scores": False}, {"raw_scores": True, "truncate": True}, {}):
            ranks = client.post("/rerank", json={"query": "w1", "texts": TEXTS, **more}).json()
            assert [rank["index"] for rank in ranks] == [1, 0]


@pytest.mark.slow
@pytest.mark.skipif(
    "TURBOTX_FRAMEWORKS" not in os.environ, reason="TURBOTX_FRAMEWORKS names no Python of theirs"
)
def test_their_own_packages():
    program = Path(__file__).with_name("framework_clients.py")
    python = os.environ["TURBOTX_FRAMEWORKS"]
    with listening(sleeping_service(api_keys=("k",))) as url:
        ran = subprocess.run(
            [python, program, url], capture_output=True, text=True, check=False, timeout=300
        )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    with client_of(sleeping_service()) as client:
        wanted = client.post("/embed", json={"inputs": [*TEXTS, TEXTS[0]]}).json()
    assert len(found) == 4
    for vectors in found.values():
        assert np.abs(np.array(vectors) - wanted).max() < 1e-6
