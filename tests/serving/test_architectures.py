"""Other people's architectures: random weights saved to disk with a tokenizer, served and asked."""

from __future__ import annotations

import pytest
import torch

from tests.serving.conftest import WORDS, word_tokenizer
from tests.serving.test_app import client_of
from turbotx.serving.cost import CostTable
from turbotx.serving.model_files import ModelFilesError, load_model
from turbotx.serving.service import Service
from turbotx.serving.settings import Settings

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": len(WORDS), "pad_token_id": 0, "max_position_embeddings": 24}
TEXTS = ["w1", "w2 w3 w4 w5 w6", "w7 w8"]


def save(folder, model):
    model.eval().save_pretrained(folder)
    word_tokenizer().tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def distilbert(tmp_path_factory):
    config = transformers.DistilBertConfig(
        **SIZES, dim=32, n_heads=4, n_layers=1, hidden_dim=64, id2label={0: "a", 1: "b", 2: "c"}
    )
    torch.manual_seed(0)
    model = transformers.DistilBertForSequenceClassification(config)
    return save(tmp_path_factory.mktemp("distilbert"), model), model


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory):
    config = transformers.BertConfig(
        **SIZES, hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64,
        num_labels=1,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.BertForSequenceClassification(config)
    return save(tmp_path_factory.mktemp("cross_encoder"), model), model


def serve(folder, **options):
    costs = CostTable.from_function(lambda n, b: 1.0 + 0.01 * n * b, 24, 8)
    settings = Settings(max_batch=8, max_batch_tokens=None, cache_nbytes=0)
    return client_of(Service(load_model(str(folder), **options), settings, costs))


def logits_of(model, text, second=None):
    row = word_tokenizer().encode(text if second is None else (text, second))
    inputs = {"input_ids": torch.tensor([row.ids])}
    if row.types is not None:
        inputs["token_type_ids"] = torch.tensor([row.types])
    with torch.no_grad():
        return model(**inputs).logits[0]


def test_a_classifier_predicts_as_the_model_does(distilbert):
    folder, model = distilbert
    with serve(folder) as client:
        found = client.post("/predict", json={"inputs": [[t] for t in TEXTS]}).json()
        assert client.get("/info").json()["model_type"]["classifier"]["id2label"]["2"] == "c"
        too_long = client.post("/predict", json={"inputs": "w1 " * 30})
        cut = client.post("/predict", json={"inputs": "w1 " * 30, "truncate": True})
    assert too_long.status_code == 413 and cut.status_code == 200
    for text, ranked in zip(TEXTS, found, strict=True):
        wanted = dict(zip("abc", logits_of(model, text).softmax(-1).tolist(), strict=True))
        assert {r["label"]: r["score"] for r in ranked} == pytest.approx(wanted, abs=1e-5)
        assert [r["label"] for r in ranked] == sorted(wanted, key=wanted.get, reverse=True)


def test_a_cross_encoder_reranks_as_the_model_does(cross_encoder):
    folder, model = cross_encoder
    with serve(folder) as client:
        body = {"query": "w9 w10", "texts": TEXTS, "raw_scores": True}
        ranks = client.post("/rerank", json=body).json()
        alone = client.post("/predict", json={"inputs": ["w9 w10", "w1"], "raw_scores": True})
    wanted = [float(logits_of(model, "w9 w10", text)) for text in TEXTS]
    assert {r["index"]: r["score"] for r in ranks} == pytest.approx(
        dict(enumerate(wanted)), abs=1e-5
    )
    assert [r["score"] for r in ranks] == sorted((r["score"] for r in ranks), reverse=True)
    assert alone.json()[0]["score"] == pytest.approx(wanted[0], abs=1e-5)


def test_an_encoder_without_files_of_its_own_pools_as_told(distilbert, tmp_path):
    _, model = distilbert
    folder = save(tmp_path, model.distilbert)
    row = word_tokenizer().encode("w1 w2")
    with torch.no_grad():
        hidden = model.distilbert(torch.tensor([row.ids])).last_hidden_state[0]
    for pooling, wanted in ((None, hidden.mean(0)), ("cls", hidden[0]), ("last", hidden[-1])):
        loaded = load_model(str(folder), backend="eager", pooling=pooling, normalize=True)
        assert loaded.info.head.normalize
        assert loaded.engine.run([row])[0].tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


def test_a_classifier_takes_no_pooling(distilbert):
    with pytest.raises(ModelFilesError, match="classifies"):
        load_model(str(distilbert[0]), pooling="cls")
    with pytest.raises(ModelFilesError, match="float64"):
        load_model(str(distilbert[0]), dtype="float64")
