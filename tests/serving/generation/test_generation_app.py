"""OpenAI's paths over generation: statuses, shapes, events, the openai client itself."""

from __future__ import annotations

import json
import re
import threading

import pytest

pytest.importorskip("starlette")

from starlette.testclient import TestClient

from tests.serving import conftest
from tests.serving.conftest import httpx, wait_until
from tests.serving.generation.tiny_decoders import generator, is_greedy, make_service
from turbotx.serving.generation.app import create_generation_app
from turbotx.serving.settings import Settings

WORDS = "w1 w2 w3"
PROMPT = [5, 6, 7]  # its tokens


@pytest.fixture(scope="module")
def client():
    with TestClient(create_generation_app(make_service())) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        yield client


def complete(client, **fields):
    body = {"prompt": WORDS, "temperature": 0, "max_tokens": 6, **fields}
    return client.post("/v1/completions", json={k: v for k, v in body.items() if v is not ...})


def events_of(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def ids_of(text):
    return generator().tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def test_a_completion_is_the_greedy_one(client):
    answer = complete(client).json()
    choice = answer["choices"][0]
    assert is_greedy(generator().model, PROMPT, ids_of(choice["text"]))
    assert choice["finish_reason"] == "length" and answer["object"] == "text_completion"
    assert answer["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    assert complete(client, prompt=PROMPT).json()["choices"][0]["text"] == choice["text"]


def test_several_prompts_and_several_texts(client):
    choices = complete(client, prompt=[WORDS, "w9"], n=2).json()["choices"]
    texts = [c["text"] for c in choices]
    assert [c["index"] for c in choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    drawn = complete(client, n=3, temperature=2, seed=1).json()
    assert len({c["text"] for c in drawn["choices"]}) == 3
    assert drawn["usage"]["prompt_tokens"] == 3
    again = complete(client, n=3, temperature=2, seed=1).json()
    assert [c["text"] for c in again["choices"]] == [c["text"] for c in drawn["choices"]]


def test_usage_and_metrics_count_tokens_that_were_not_read(client):
    prompt = list(range(4, 104))
    first, again = (complete(client, prompt=[prompt, PROMPT], n=2).json()["usage"] for _ in "ab")
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["prompt_tokens_details"]["cached_tokens"] == 64
    response = complete(client, prompt=prompt, stream=True, stream_options={"include_usage": True})
    assert events_of(response)[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 64
    said = client.get("/metrics").text
    assert "turbotx_prefix_hit_tokens_total 128.0" in said
    assert "turbotx_cache_blocks_cached" in said and client.get("/info").json()["prefix_cache"]


def test_a_stream_has_the_same_text_piece_by_piece(client):
    whole = complete(client).json()["choices"][0]["text"]
    response = complete(client, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *parts, last = events_of(response)
    assert "".join(p["choices"][0]["text"] for p in parts) == whole and len(parts) == 6
    assert [p["choices"][0]["finish_reason"] for p in parts] == [None] * 5 + ["length"]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 6


def test_probabilities(client):
    found = complete(client, logprobs=3, echo=True).json()["choices"][0]
    assert found["text"].startswith(WORDS)
    logprobs = found["logprobs"]
    assert len(logprobs["tokens"]) == 6 and all(len(t) == 3 for t in logprobs["top_logprobs"])
    for token, logprob, top in zip(logprobs["tokens"], logprobs["token_logprobs"],
                                   logprobs["top_logprobs"], strict=True):  # fmt: skip
        assert top[token] == logprob == max(top.values())


def test_a_chat(client):
    messages = [{"role": "user", "content": [{"type": "text", "text": WORDS}]}]
    body = {"messages": messages, "temperature": 0, "max_completion_tokens": 4,
            "logprobs": True, "top_logprobs": 2}  # fmt: skip
    answer = client.post("/v1/chat/completions", json=body).json()
    choice = answer["choices"][0]
    assert answer["object"] == "chat.completion" and choice["message"]["role"] == "assistant"
    assert is_greedy(generator().model, PROMPT, ids_of(choice["message"]["content"]))
    assert [len(t["top_logprobs"]) for t in choice["logprobs"]["content"]] == [2] * 4
    first, *rest = events_of(client.post("/v1/chat/completions", json={**body, "stream": True}))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in rest)
    assert text == choice["message"]["content"]


@pytest.mark.parametrize(("fields", "status", "said"), [
    ({"prompt": ...}, 422, "prompt"),
    ({"prompt": ""}, 422, "empty"),
    ({"prompt": []}, 422, "prompt must be a text"),
    ({"prompt": [5000]}, 422, "token ids must lie"),
    ({"temperature": -1}, 422, "temperature"),
    ({"suffix": "x"}, 422, "suffix"),
    ({"best_of": 2}, 422, "best_of"),
    ({"stop": ["a"] * 17}, 422, "stop"),
    ({"stop": ""}, 422, "stop"),
    ({"logit_bias": {"x": 1}}, 422, "logit_bias"),
    ({"frequency": 1}, 422, "frequency"),
    ({"max_tokens": 500}, 413, "model's 160"),
    ({"prompt": "w1 " * 20_000}, 413, "far more"),
    ({"prompt": ["w1"] * 100, "n": 2}, 413, "at most 128"),
])  # fmt: skip
def test_what_is_refused_and_why(client, fields, status, said):
    for stream in (False, True):
        response = complete(client, stream=stream, **fields)
        assert response.status_code == status and said in response.json()["error"]["message"]


def test_chats_that_are_refused(client):
    def chat(**fields):
        body = {"messages": [{"role": "user", "content": "w1"}], **fields}
        return client.post("/v1/chat/completions", json=body)

    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    for fields, said in [
        ({"messages": []}, "messages"),
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "json_object"),
        ({"messages": [{"role": "user", "content": image}]}, "image_url"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "tokenize"),
    ]:
        response = chat(**fields)
        assert response.status_code == 422 and said in response.json()["error"]["message"]


def test_a_model_without_a_template_says_so(client, monkeypatch):
    monkeypatch.setattr(generator().tokenizer, "chat_template", None)
    body = {"messages": [{"role": "user", "content": "w1"}]}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 422 and "/v1/completions" in response.json()["error"]["message"]


def test_what_tells(client):
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.get("/v1/models/other").status_code == 404
    info = client.get("/info").json()
    assert info["max_length"] == 160 and info["chat"]
    captures = []
    for _ in range(2):  # other tests' services have the same model, and may have changed it
        complete(client)
        metrics = client.get("/metrics").text
        captures.append(re.search(r"^turbotx_engine_captures ([1-9]\d*\.0)$", metrics, re.M)[1])
    assert captures[0] == captures[1]
    for name in ("turbotx_generated_tokens_total", "turbotx_first_token_seconds_count",
                 "turbotx_sequences_running", "turbotx_cache_positions_used"):  # fmt: skip
        assert name in metrics
    document = client.get("/openapi.json").json()
    assert "/v1/chat/completions" in document["paths"]


def test_a_key_is_asked_for():
    service = make_service(settings=Settings(api_keys=("secret",)))
    with TestClient(create_generation_app(service)) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        assert complete(client).status_code == 401
        client.headers["authorization"] = "Bearer secret"
        assert complete(client).status_code == 200


def listening(service):
    return conftest.listening(service, application=create_generation_app)


def test_openais_own_client_streams_from_it():
    openai = pytest.importorskip("openai")
    with listening(make_service()) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        whole = client.completions.create(
            model="tiny", prompt=WORDS, max_tokens=8, temperature=0, logprobs=1
        )
        stream = client.completions.create(
            model="tiny", prompt=WORDS, max_tokens=8, temperature=0, stream=True
        )
        assert "".join(e.choices[0].text for e in stream) == whole.choices[0].text
        messages = [{"role": "user", "content": WORDS}]
        chat = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=8, temperature=0, stream=True
        )
        parts = [e.choices[0].delta.content or "" for e in chat]
        assert "".join(parts).strip() == whole.choices[0].text.strip() and len(parts) > 4
        with pytest.raises(openai.UnprocessableEntityError, match="suffix"):
            client.completions.create(model="tiny", prompt=WORDS, suffix="x")


def test_a_client_that_leaves_a_stream_frees_its_place():
    service = make_service()
    with listening(service) as url:
        body = {"prompt": WORDS, "max_tokens": 150, "stream": True, "ignore_eos": True}
        for _ in range(3):
            with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
                next(response.iter_lines())
        wait_until(lambda: service.worker.figures()["sequences_running"] == 0)
        wait_until(lambda: service.worker.figures()["cache_nbytes"] == 0)


def test_overload_is_answered_with_429_and_nothing_is_lost():
    service = make_service(max_waiting=4, max_sequences=2)
    with listening(service) as url:
        statuses = []

        def ask():
            body = {"prompt": WORDS, "max_tokens": 60, "ignore_eos": True}
            response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            statuses.append(response.status_code)
            if response.status_code == 200:
                assert response.json()["usage"]["completion_tokens"] == 60
            else:
                assert "retry-after" in response.headers

        threads = [threading.Thread(target=ask) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(statuses) == 40 and set(statuses) == {200, 429}
    assert statuses.count(200) >= 6
