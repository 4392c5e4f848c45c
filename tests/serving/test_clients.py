"""The paths, fields and headers of the clients that others wrote."""

from __future__ import annotations

import gzip
import zlib

import numpy as np
import pytest

from tests.serving.conftest import fast_costs, sleeping_service, stand_in
from tests.serving.test_app import Logits, classifier, client_of
from turbotx.serving.service import Service
from turbotx.serving.settings import Settings, SettingsError


@pytest.fixture(scope="module")
def client():
    with client_of(sleeping_service(max_body_nbytes=2000, url_prefix="")) as client:
        yield client


@pytest.mark.parametrize(
    "path, needed, optional",
    [
        ("/embed", {"inputs": "w1"},
         ["normalize", "truncate", "truncation_direction", "prompt_name", "dimensions"]),
        ("/v1/embeddings", {"input": "w1"}, ["model", "encoding_format", "dimensions", "user"]),
        ("/tokenize", {"inputs": "w1"}, ["add_special_tokens", "prompt_name"]),
        ("/decode", {"ids": [5]}, ["skip_special_tokens"]),
        ("/similarity", {"inputs": {"source_sentence": "w1", "sentences": ["w2"]}}, ["parameters"]),
    ],
)  # fmt: skip
def test_null_is_as_if_absent_and_unknown_fields_are_named(client, path, needed, optional):
    plain = client.post(path, json=needed)
    assert plain.status_code == 200
    assert client.post(path, json={**needed, **dict.fromkeys(optional)}).json() == plain.json()
    wrong = client.post(path, json={**needed, "instruction": "find"})
    assert wrong.status_code == 422 and "instruction" in wrong.text


def test_null_for_classifiers_too():
    with client_of(classifier("score")) as client:
        for path, needed, optional in (
            ("/rerank", {"query": "w1", "texts": ["w2"]},
             ["raw_scores", "return_text", "truncate", "truncation_direction"]),
            ("/v1/rerank", {"query": "w1", "documents": ["w2"]},
             ["model", "top_n", "return_documents"]),
            ("/predict", {"inputs": "w1"},
             ["raw_scores", "truncate", "truncation_direction", "parameters"]),
        ):  # fmt: skip
            bodies = needed, {**needed, **dict.fromkeys(optional)}
            plain, asked = (client.post(path, json=body).json() for body in bodies)
            if path == "/v1/rerank":
                assert plain.pop("id") != asked.pop("id")
            assert asked == plain and plain


def test_the_root_is_what_the_model_is_for(client):
    assert client.post("/", json={"inputs": "w1"}).json() == client.post(
        "/embed", json={"inputs": "w1"}
    ).json()  # fmt: skip
    with client_of(classifier("score")) as ranks:
        assert ranks.post("/", json={"query": "w1", "texts": ["w2"]}).json()[0]["index"] == 0
    with client_of(classifier("a", "b")) as predicts:
        assert len(predicts.post("/", json={"inputs": "w1"}).json()) == 2


def test_other_names_of_openais_paths(client):
    body = {"input": "w1 w2"}
    answers = [client.post(path, json=body).json() for path in ("/v1/embeddings", "/embeddings")]
    assert answers[0] == answers[1]
    for path in ("/v1/models", "/models"):
        assert client.get(path).json()["data"][0]["id"] == "stand-in"
        assert client.get(f"{path}/stand-in").json()["id"] == "stand-in"
        missing = client.get(f"{path}/org/another")
        assert missing.status_code == 404 and "org/another" in missing.json()["error"]["message"]


def test_documents_are_reranked_in_coheres_shape():
    with client_of(classifier("score")) as client:
        body = {"model": "any", "query": "w0", "documents": ["w1", {"text": "w1 w2 w3", "id": 7}]}
        answer = client.post("/v1/rerank", json=body).json()
        assert [r["index"] for r in answer["results"]] == [1, 0]
        assert answer["model"] == "stand-in" and answer["usage"] == {"total_tokens": 12}
        assert answer["results"][0]["relevance_score"] == pytest.approx(1 / (1 + np.exp(-7)))
        assert "document" not in answer["results"][0]
        body = {**body, "top_n": 1, "return_documents": True}
        (first,) = client.post("/v2/rerank", json=body).json()["results"]
        assert first["document"] == {"text": "w1 w2 w3"}
        assert client.post("/v1/rerank", json={**body, "documents": []}).status_code == 422
        long = client.post("/v1/rerank", json={**body, "documents": ["w1 " * 90]})
        assert long.status_code == 200


def test_similarity_is_the_cosine(client):
    inputs = {"source_sentence": "w1 w2", "sentences": ["w1 w2", "w9 w50"]}
    same, other = client.post("/similarity", json={"inputs": inputs}).json()
    vectors = client.post("/embed", json={"inputs": ["w1 w2", "w9 w50"], "normalize": True}).json()
    assert same == pytest.approx(1) and other == pytest.approx(float(np.dot(*vectors)), abs=1e-6)


def test_ids_are_decoded(client):
    assert client.post("/decode", json={"ids": [2, 5, 6, 3]}).json() == ["[CLS] w1 w2 [SEP]"]
    assert client.post("/decode", json={"ids": [[5], [6, 7]]}).json() == ["w1", "w2 w3"]
    for wrong in ([5, [6]], [99999], [-1], ["w1"]):
        assert client.post("/decode", json={"ids": wrong}).status_code == 422


def test_hugging_faces_parameters():
    with client_of(classifier("a", "b", "c")) as client:
        asked = {"top_k": 1, "function_to_apply": "sigmoid"}
        (best,) = client.post("/predict", json={"inputs": "w1", "parameters": asked}).json()
        assert best == {"label": "a", "score": pytest.approx(1 / (1 + np.exp(-3)))}


@pytest.mark.parametrize(
    "coding, pack", [("gzip", gzip.compress), ("deflate", zlib.compress)]
)  # fmt: skip
def test_packed_bodies(client, coding, pack):
    headers = {"content-encoding": coding, "content-type": "application/json"}
    whole = pack(b'{"inputs": "w1"}')
    assert client.post("/embed", content=whole, headers=headers).status_code == 200
    assert client.post("/embed", content=whole[:-5], headers=headers).status_code == 422
    assert client.post("/embed", content=b"{}", headers=headers).status_code == 422
    more = client.post("/embed", content=whole + b"more", headers=headers)
    assert more.status_code == 422 and "more follows its end" in more.json()["error"]
    bomb = pack(b" " * 3_000_000)
    assert client.post("/embed", content=bomb, headers=headers).status_code == 413
    other = client.post("/embed", content=whole, headers={"content-encoding": "br"})
    assert other.status_code == 415 and "gzip" in other.json()["error"]


def test_headers_say_what_an_answer_took(client):
    answer = client.post(
        "/embed", json={"inputs": ["w1 w2", "w3"]}, headers={"x-request-id": "a-1"}
    )
    assert answer.headers["x-request-id"] == "a-1"
    assert answer.headers["x-compute-type"] == "cpu"
    assert answer.headers["x-compute-tokens"] == "7"
    assert answer.headers["x-compute-characters"] == "7"
    for name in ("compute-time", "total-time", "tokenization-time", "queue-time", "inference-time"):
        assert int(answer.headers[f"x-{name}"]) >= 0
    refused = client.post("/embed", json={}, headers={"x-request-id": "x" * 300})
    assert len(refused.headers["x-request-id"]) == 32


def test_a_key_may_come_in_either_header():
    with client_of(sleeping_service(api_keys=("s3cret",))) as client:
        for given, status in (({"x-api-key": "s3cret"}, 200), ({"x-api-key": "no"}, 401),
                              ({"authorization": "Bearer no", "x-api-key": "s3cret"}, 401)):  # fmt: skip  # noqa: E501
            assert client.post("/embed", json={"inputs": "w0"}, headers=given).status_code == status


def test_pages_of_other_origins_ask_where_they_may():
    with client_of(sleeping_service(cors_allow_origin=("https://a.example",))) as client:
        asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
        allowed = client.options("/embed", headers=asked).headers
        assert allowed["access-control-allow-origin"] == "https://a.example"
        answer = client.post("/embed", json={"inputs": "w1"}, headers=asked)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        other = client.post(
            "/embed", json={"inputs": "w1"}, headers={"origin": "https://b.example"}
        )
        assert "access-control-allow-origin" not in other.headers


def test_a_prefix_of_every_path():
    service = sleeping_service(url_prefix="/models/one")
    from starlette.testclient import TestClient

    from turbotx.serving.app import create_app

    with TestClient(create_app(service)) as client:
        while client.get("/models/one/ready").status_code != 200:
            pass
        assert client.post("/models/one/embed", json={"inputs": "w1"}).status_code == 200
        assert client.post("/embed", json={"inputs": "w1"}).status_code == 404
        document = client.get("/models/one/openapi.json").json()
        assert document["servers"] == [{"url": "/models/one"}]
    for wrong in ("models", "/models/", "/"):
        with pytest.raises(SettingsError, match="url_prefix"):
            Settings(url_prefix=wrong)


def test_too_long_texts_are_cut_everywhere_where_the_server_was_started_so():
    settings = Settings(max_batch=8, max_batch_tokens=None, auto_truncate=True)
    with client_of(Service(stand_in(), settings, fast_costs())) as client:
        long = "w1 " * 90
        for path, body in (("/embed", {"inputs": long}), ("/v1/embeddings", {"input": long})):
            assert client.post(path, json=body).status_code == 200
        assert client.post("/embed", json={"inputs": long, "truncate": False}).status_code == 413
    with client_of(Service(stand_in(Logits("score")), settings, fast_costs())) as client:
        assert client.post("/rerank", json={"query": "w1", "texts": [long]}).status_code == 200


def test_the_page_about_the_api_names_paths_and_fields(client):
    page = client.get("/docs").text
    assert "POST /v1/embeddings" in page and "<code>encoding_format</code>" in page
