"""Malformed bodies against a listening server: any refusal will do, a 500 will not."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.serving.conftest import httpx, listening, sleeping_service

schemathesis = pytest.importorskip("schemathesis")
from schemathesis import GenerationMode  # noqa: E402

PATHS = (
    "/embed", "/predict", "/rerank", "/tokenize", "/v1/embeddings", "/v1/rerank", "/similarity",
    "/decode",
)  # fmt: skip
EXPECTED = {200, 401, 404, 405, 413, 415, 422, 424}


@pytest.fixture(scope="module")
def server():
    service = sleeping_service()
    with listening(service) as url:
        yield service, url


def fuzz(examples):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large,
              HealthCheck.filter_too_much]  # fmt: skip
    return settings(max_examples=examples, phases=[Phase.generate], suppress_health_check=checks,
                    deadline=None)  # fmt: skip


@pytest.mark.parametrize("mode", [GenerationMode.NEGATIVE, GenerationMode.POSITIVE])
@pytest.mark.parametrize("path", PATHS)
def test_bodies_from_the_description(server, path, mode):
    service, url = server
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operation = schema[path]["POST"]

    @fuzz(100 if mode is GenerationMode.NEGATIVE else 40)
    @given(operation.as_strategy(generation_mode=mode))
    def send(case):
        assert case.call().status_code in EXPECTED

    send()
    assert service.dispatcher.alive


@pytest.mark.parametrize("path", PATHS)
def test_bodies_of_any_bytes_and_any_json(server, path):
    service, url = server
    json_values = st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=8,
    )
    names = st.sampled_from(["inputs", "input", "query", "texts", "documents", "ids"])
    with httpx.Client(base_url=url) as client:

        @fuzz(40)
        @given(st.binary(max_size=60), st.dictionaries(names, json_values, max_size=4))
        def send(content, body):
            assert client.post(path, content=content).status_code in EXPECTED
            assert client.post(path, json=body).status_code in EXPECTED

        send()
    assert service.dispatcher.alive
