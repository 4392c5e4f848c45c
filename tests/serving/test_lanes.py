"""Several models before one engine: admission, order, what each answers."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.sleep_engine import SleepEngine
from tests.serving.conftest import fast_costs, stand_in
from tests.serving.test_app import Logits, client_of
from turbotx.serving.cost import CostTable
from turbotx.serving.engine import Head
from turbotx.serving.lanes import Lanes
from turbotx.serving.model_files import LoadedModel, ModelInfo
from turbotx.serving.request import Request
from turbotx.serving.scheduler import Overloaded, Scheduler
from turbotx.serving.service import Service
from turbotx.serving.settings import Settings, SettingsError


def costs(scale=1.0):
    return CostTable.from_function(lambda n, b: scale * (4 + 0.02 * n * b), 100, 8)


def lanes_of(max_age_ms=10_000.0, **scales):
    return Lanes({
        name: Scheduler(costs(scale), max_batch=8, max_age_ms=max_age_ms)
        for name, scale in scales.items()
    })  # fmt: skip


def run_all(lanes, now_ms=0.0):
    """The batches in their order, as (model, keys)."""
    found = []
    while (batch := lanes.next(now_ms)) is not None:
        (model,) = {r.model for r in batch.requests}
        found.append((model, sorted(r.key for r in batch.requests)))
        lanes.complete(batch, batch.cost_ms)
        now_ms += batch.cost_ms
    return found


def test_no_batch_mixes_models_and_all_are_run():
    lanes = lanes_of(a=1.0, b=1.0)
    for key in range(20):
        lanes.submit(Request(key, 10 + key, 0.0, model="ab"[key % 2]))
    assert len(lanes) == len(lanes.waiting) == 20
    found = run_all(lanes)
    assert sorted(key for _, keys in found for key in keys) == list(range(20))
    for model, keys in found:
        assert {"ab"[key % 2] for key in keys} == {model}
    assert len(lanes) == 0 and lanes.backlog_ms == 0.0


def test_the_cheap_model_goes_first_and_the_dear_one_does_not_starve():
    lanes = lanes_of(cheap=1.0, dear=20.0)
    lanes.submit(Request("d", 50, 0.0, model="dear"))
    lanes.submit(Request("c", 50, 0.0, model="cheap"))
    assert [model for model, _ in run_all(lanes)] == ["cheap", "dear"]
    lanes = lanes_of(max_age_ms=3000.0, cheap=1.0, dear=20.0)
    lanes.submit(Request("d", 50, 0.0, model="dear"))
    now_ms, turns = 0.0, 0
    while lanes.queues["dear"].waiting:
        turns += 1
        lanes.submit(Request(turns, 50, now_ms, model="cheap"))
        batch = lanes.next(now_ms)
        now_ms += batch.cost_ms
        assert now_ms < 1200  # a third of the bound, and a batch
    assert turns > 3


def test_the_higher_class_goes_first_across_models_under_overload():
    lanes = lanes_of(max_age_ms=1200.0, a=1.0, b=1.0)
    for key in range(60):
        lanes.submit(Request(key, 50, 0.0, model="a", patient=True))
    lanes.submit(Request("high", 90, 0.0, priority=1, model="b"))
    assert run_all(lanes)[0] == ("b", ["high"])


def test_admission_counts_the_work_of_all_models():
    lanes = lanes_of(max_age_ms=300.0, a=1.0, b=1.0)
    key = 0
    while not lanes.full(0):
        key += 1
        lanes.submit(Request(key, 100, 0.0, model="a"))
    assert not lanes.queues["b"].full(0)
    with pytest.raises(Overloaded):
        lanes.submit(Request("late", 5, 0.0, model="b"))
    lanes.submit(Request("urgent", 5, 0.0, priority=1, model="b"))
    assert lanes.cancel("urgent") and not lanes.cancel("urgent")


def test_classes_deadlines_and_ages_reach_every_queue():
    lanes = lanes_of(max_age_ms=100.0, a=1.0, b=1.0)
    lanes.submit(Request("x", 5, 0.0, deadline_ms=10.0, priority=-1, model="b"))
    lanes.raise_to("x", 20.0, 1)
    (waiting,) = lanes.waiting
    assert (waiting.deadline_ms, waiting.priority) == (20.0, 1)
    assert lanes.overdue(15.0) == [] and lanes.overdue(21.0) == [waiting]
    lanes.submit(Request("y", 5, 0.0, model="a"))
    assert [r.key for r in lanes.expire(100.0)] == ["y"] and lanes.wake_ms(100.0) == np.inf


def named(engine, name):
    model = stand_in(engine)
    info = ModelInfo(name, f"r-{name}", "float32", 32, model.info.width, engine.head)
    return LoadedModel(engine, model.tokenizer, info, model.costs)


@pytest.fixture(scope="module")
def client():
    wide = SleepEngine(fast_costs(), width=12, head=Head("embedding"))
    small = SleepEngine(fast_costs(), head=Head("embedding"))
    models = [named(Logits("score"), "ranks"), named(small, "small"), named(wide, "wide")]
    settings = Settings(max_batch=8, max_batch_tokens=None)
    with client_of(Service(models, settings, fast_costs())) as client:
        yield client


def test_requests_name_their_model(client):
    for name, width in (("small", 8), ("wide", 12), ("small", 8)):  # same ids: not one answer
        for path, field in (("/embed", "inputs"), ("/v1/embeddings", "input")):
            answer = client.post(path, json={field: "w1 w2", "model": name}).json()
            vector = answer[0] if path == "/embed" else answer["data"][0]["embedding"]
            assert len(vector) == width
        assert answer["model"] == name
    missing = client.post("/embed", json={"inputs": "w1", "model": "none"})
    assert missing.status_code == 404 and "ranks, small, wide" in missing.json()["error"]


def test_who_names_none_gets_the_first_that_can_answer(client):
    assert len(client.post("/embed", json={"inputs": "w1"}).json()[0]) == 8
    ranks = client.post("/rerank", json={"query": "w1", "texts": ["w2"]}).json()
    assert ranks[0]["index"] == 0
    wrong = client.post("/rerank", json={"query": "w1", "texts": ["w2"], "model": "wide"})
    assert wrong.status_code == 422 and "the kind of wide is embedding" in wrong.json()["error"]


def test_all_models_are_described(client):
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["ranks", "small", "wide"]
    assert client.get("/v1/models/wide").json()["id"] == "wide"
    models = client.get("/info").json()["models"]
    assert [m["model_id"] for m in models] == ["ranks", "small", "wide"]


def test_two_models_of_one_name_are_refused():
    with pytest.raises(SettingsError, match="models of one name: stand-in, stand-in"):
        Service([stand_in(), stand_in()], Settings())
