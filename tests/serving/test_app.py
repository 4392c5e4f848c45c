"""The HTTP application with a stand-in engine: shapes, limits, statuses."""

from __future__ import annotations

import base64
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from starlette.testclient import TestClient

from tests.serving.conftest import fast_costs, sleeping_service, stand_in, wait_until
from turbotx.serving.app import create_app
from turbotx.serving.engine import Head
from turbotx.serving.service import Service
from turbotx.serving.settings import Settings, SettingsError


class Logits:
    """A classifier whose logits are the row's length, then zeros."""

    def __init__(self, *labels):
        self.head = Head("classifier", labels=labels)

    packs = False

    def run(self, rows):
        logits = np.zeros((len(rows), len(self.head.labels)), dtype=np.float32)
        logits[:, 0] = [len(row) for row in rows]
        return logits

    def figures(self):
        return {"arena_nbytes": 4096.0}


@contextlib.contextmanager
def client_of(service, **headers):
    with TestClient(create_app(service), headers=headers) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        yield client


@pytest.fixture(scope="module")
def client():
    with client_of(sleeping_service(max_client_batch=4, max_body_nbytes=2000)) as client:
        yield client


def classifier(*labels):
    settings = Settings(max_batch=8, max_batch_tokens=None)
    return Service(stand_in(Logits(*labels)), settings, fast_costs())


def test_embed_one_many_and_ids(client):
    one = client.post("/embed", json={"inputs": "w0 w1"}).json()
    many = client.post("/embed", json={"inputs": ["w0 w1", "w5"]}).json()
    ids = client.post("/embed", json={"inputs": [[2, 4, 5, 3]]}).json()
    assert one[0] == many[0] == ids[0] and len(many) == 2
    assert np.linalg.norm(one[0]) == pytest.approx(1)
    raw = client.post("/embed", json={"inputs": "w0 w1", "normalize": False}).json()[0]
    assert raw == [2, 4, 5, 3, 2, 4, 5, 3]


def test_openai_shape_base64_and_dimensions(client):
    body = {"input": ["w0", "w1"], "model": "any", "dimensions": 3}
    plain = client.post("/v1/embeddings", json=body).json()
    assert plain["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    assert [d["index"] for d in plain["data"]] == [0, 1] and plain["object"] == "list"
    coded = client.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()
    vector = np.frombuffer(base64.b64decode(coded["data"][1]["embedding"]), "<f4")
    assert vector.tolist() == pytest.approx(plain["data"][1]["embedding"])
    assert np.linalg.norm(vector) == pytest.approx(1) and len(vector) == 3


@pytest.mark.parametrize(
    "body, status, says",
    [
        ({"inputs": []}, 422, "empty list"),
        ({"inputs": ""}, 422, "empty"),
        ({"inputs": ["w0", [2]]}, 422, "mixes"),
        ({"inputs": [2, "w0"]}, 422, "mixes"),
        ({"inputs": [99999]}, 422, "0 to"),
        ({"inputs": None}, 422, "inputs"),
        ({}, 422, "inputs"),
        ([], 422, "array"),
        ({"inputs": "w0", "dimensions": 0}, 422, "dimensions"),
        ({"inputs": "w0", "dimensions": 99}, 422, "dimensions"),
        ({"inputs": "w0", "truncation_direction": "up"}, 422, "truncation"),
        ({"inputs": "w0 " * 40}, 413, "42 tokens"),
        ({"inputs": ["w0"] * 5}, 413, "at most 4"),
        ({"inputs": "w0" * 2000}, 413, "2000 bytes"),
    ],
)
def test_refusals_say_why(client, body, status, says):
    answer = client.post("/embed", json=body)
    assert answer.status_code == status
    assert says in answer.json()["error"]
    openai = client.post("/v1/embeddings", json={"input": body.get("inputs", [])} if isinstance(body, dict) and "dimensions" not in body and "truncation_direction" not in body else {})  # fmt: skip  # noqa: E501
    assert openai.status_code in (413, 422) and openai.json()["error"]["message"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b'"' * 9, b"[" * 1500, b'{"inputs": "\\ud800"}']
)
def test_malformed_bodies_are_422(client, content):
    assert client.post("/embed", content=content).status_code == 422


def test_truncation_is_the_clients_choice(client):
    body = {"inputs": "w1 " + "w0 " * 40, "truncate": True, "normalize": False}
    assert client.post("/embed", json=body).json()[0][:3] == [2, 5, 4]
    body["truncation_direction"] = "left"
    assert client.post("/embed", json=body).json()[0][:3] == [2, 4, 4]


def test_scope_headers_are_checked(client):
    good = {"x-priority": "high", "x-deadline-ms": "50"}
    assert client.post("/embed", json={"inputs": "w0"}, headers=good).status_code == 200
    for bad in ({"x-priority": "first"}, {"x-deadline-ms": "soon"}, {"x-deadline-ms": "-1"}, {"x-deadline-ms": "nan"}):  # fmt: skip  # noqa: E501
        assert client.post("/embed", json={"inputs": "w0"}, headers=bad).status_code == 422


def test_tokenize_info_health_models(client):
    tokens = client.post("/tokenize", json={"inputs": ["w0", "w1 w2"]}).json()
    assert [len(t) for t in tokens] == [3, 4]
    info = client.get("/info").json()
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert info["max_input_length"] == 32 and info["max_client_batch_size"] == 4
    assert client.get("/health").status_code == 200
    assert client.get("/v1/models").json()["data"][0]["id"] == "stand-in"


def test_unknown_paths_and_methods_are_json_too(client):
    assert client.get("/nowhere").status_code == 404
    wrong = client.get("/embed")
    assert wrong.status_code == 405 and wrong.json()["error_type"] == "validation"


def test_every_path_is_described(client):
    document = client.get("/openapi.json").json()
    paths = {r.path.replace(":path", "") for r in client.app.routes} - {"/openapi.json", "/docs"}
    assert paths == set(document["paths"])
    references = str(document).split("#/components/schemas/")[1:]
    assert {r.split("'")[0] for r in references} <= set(document["components"]["schemas"])


def test_metrics_have_teis_names_and_our_own(client):
    client.post("/embed", json={"inputs": ["w3 w4 w5", "w6"]})
    client.post("/embed", json={"inputs": []})
    text = client.get("/metrics").text
    for name in (
        "te_request_count", "te_request_success", "te_request_failure",
        "te_request_duration_bucket", "te_request_queue_duration_bucket", "te_queue_size",
        "te_request_inference_duration_bucket", "te_batch_next_size_bucket",
        "te_batch_next_tokens_bucket", "te_request_tokenization_duration_bucket",
        "turbotx_padding_ratio_bucket", "turbotx_plan_ms_bucket", "turbotx_backlog_ms",
    ):  # fmt: skip
        assert f"\n{name}" in text, name
    assert 'te_request_failure{err="validation"}' in text


def test_rerank_sorts_and_predict_is_for_classifiers():
    with client_of(classifier("score")) as client:
        body = {"query": "w0", "texts": ["w1", "w1 w2 w3", "w1 w2"], "return_text": True}
        ranks = client.post("/rerank", json=body).json()
        assert [r["index"] for r in ranks] == [1, 2, 0] and ranks[0]["text"] == "w1 w2 w3"
        assert all(0 < r["score"] <= 1 for r in ranks)
        raw = client.post("/rerank", json={**body, "raw_scores": True}).json()
        assert [r["score"] for r in raw] == [7, 6, 5]
        assert "text" not in client.post("/rerank", json={**body, "return_text": False}).json()[0]
        assert client.post("/rerank", json={**body, "texts": []}).status_code == 422
        assert "turbotx_engine_arena_nbytes 4096" in client.get("/metrics").text
        assert client.post("/embed", json={"inputs": "w0"}).status_code == 422


def test_predict_texts_pairs_and_lists():
    with client_of(classifier("long", "short")) as client:
        one = client.post("/predict", json={"inputs": "w0"}).json()
        assert [p["label"] for p in one] == ["long", "short"]
        assert sum(p["score"] for p in one) == pytest.approx(1)
        pair = client.post("/predict", json={"inputs": ["w0", "w1"], "raw_scores": True}).json()
        assert pair[0]["score"] == 5
        body = {"inputs": [["w0"], ["w0", "w1"]], "raw_scores": True}
        assert [p[0]["score"] for p in client.post("/predict", json=body).json()] == [3, 5]
        for bad in ([], ["a", "b", "c"], [["a"], "b"], [[]]):
            assert client.post("/predict", json={"inputs": bad}).status_code == 422
        assert client.post("/rerank", json={"query": "a", "texts": ["b"]}).status_code == 422


def test_a_key_is_asked_for_except_by_probes():
    with client_of(sleeping_service(api_keys=("other", "s3cret", "clé"))) as client:
        body = {"inputs": "w0"}
        assert client.post("/embed", json=body).status_code == 401
        for wrong in ("Bearer no", "Basic s3cret", "Bearer \xe9"):
            given = {"authorization": wrong.encode("latin-1")}
            assert client.post("/embed", json=body, headers=given).status_code == 401
        given = {"authorization": "Bearer clé".encode()}
        assert client.post("/embed", json=body, headers=given).status_code == 200
        given = {"authorization": "Bearer s3cret"}
        assert client.post("/embed", json=body, headers=given).status_code == 200
        assert client.get("/info").status_code == 401
        assert client.get("/health").status_code == 200


def test_a_time_out_is_503_and_leaves_the_queue():
    slow = fast_costs(scale=300.0)
    with client_of(sleeping_service(slow, timeout_ms=50)) as client:
        answer = client.post("/embed", json={"inputs": "w0"})
        assert answer.status_code == 503 and answer.json()["error_type"] == "timeout"
        assert "retry-after" in answer.headers


def test_an_idle_server_takes_a_request_of_more_work_than_it_admits_at_a_time():
    service = sleeping_service(fast_costs(scale=50.0), max_age_ms=1500.0)
    with client_of(service) as client:
        texts = [f"w{i} " * 20 for i in range(80)]  # 700 ms of work, 500 are admitted
        for _ in range(2):
            assert len(client.post("/embed", json={"inputs": texts}).json()) == 80
        assert "turbotx_dropped_total 0.0" in client.get("/metrics").text


def test_what_is_overdue_when_its_turn_comes_is_not_computed():
    with client_of(sleeping_service(fast_costs(scale=300.0))) as client:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(client.post, "/embed", json={"inputs": "w0"})
            time.sleep(0.1)
            late = client.post("/embed", json={"inputs": "w1"}, headers={"x-deadline-ms": "20"})
            assert late.status_code == 504 and "deadline" in late.json()["error"]
            assert running.result().status_code == 200
        assert "turbotx_tokens_total 3.0" in client.get("/metrics").text


def test_before_it_is_ready_it_says_so():
    service = sleeping_service()
    app = create_app(service)
    client = TestClient(app)  # no lifespan: never started
    assert client.get("/ready").status_code == 503
    assert client.post("/embed", json={"inputs": "w0"}).status_code == 503
    assert client.get("/health").status_code == 200


def test_settings_are_checked():
    with pytest.raises(SettingsError, match="policy"):
        Settings(policy="random")
    for name, value in (("timeout_ms", float("inf")), ("max_age_ms", float("nan")), ("lazy_ms", float("nan"))):  # fmt: skip  # noqa: E501
        with pytest.raises(SettingsError, match=name):
            Settings(**{name: value})
    with pytest.raises(SettingsError, match="max_batch"):
        Settings(max_batch=0)
    with pytest.raises(SettingsError, match="API key"):
        Settings(api_keys=("",))
