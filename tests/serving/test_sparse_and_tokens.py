"""Models of one weight a word (SPLADE), and of one vector a token."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
library = pytest.importorskip("sentence_transformers")

from tests.serving.test_sentence_transformers import models, serve  # noqa: E402
from tests.serving.tiny_models import (  # noqa: E402
    SIZES,
    TEXTS,
    bert,
    change_json,
    randomize,
    save,
    tokenizer,
    write_json,
)
from turbotx.serving.engine import Head  # noqa: E402
from turbotx.serving.model_files import ModelFilesError, load_model  # noqa: E402
from turbotx.serving.model_info import MOST_LOGITS, ModelInfo  # noqa: E402

splade = importlib.import_module("sentence_transformers.sparse_encoder.modules")


def masked(folder):
    torch.manual_seed(0)
    return save(folder, randomize(transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))))


def sparse(folder, *choices, **options):
    """Save a SparseEncoder; ``choices`` are SpladePooling's."""
    base = masked(folder / "base")
    transformer = models.Transformer(str(base), transformer_task="fill-mask")
    pooling = splade.SpladePooling(*choices)
    whole = library.SparseEncoder(modules=[transformer, pooling], device="cpu", **options)
    whole.save(str(folder / "saved"), create_model_card=False)
    return folder / "saved"


def ask_sparse(folder, body=None, **options):
    """(texts, vocabulary), filled up with zeros."""
    with serve(folder, **options) as client:
        assert client.post("/embed", json={"inputs": "w1"}).status_code == 422
        body = {"inputs": TEXTS, **(body or {})}
        answers = [client.post(path, json=body).json() for path in ("/embed_sparse", "/")]
        info = client.get("/info").json()
    assert answers[0] == answers[1]
    assert info["model_type"] == {"embedding": {"pooling": "splade"}}
    found = np.zeros((len(TEXTS), info["width"]))
    for row, words in zip(found, answers[0], strict=True):
        assert [w["index"] for w in words] == sorted({w["index"] for w in words})
        for word in words:
            assert word["value"] > 0
            row[word["index"]] = word["value"]
    return found


def encode_sparse(folder, **options):
    model = library.SparseEncoder(str(folder), device="cpu", local_files_only=True)
    return np.stack([model.encode(t, **options).to_dense().numpy() for t in TEXTS])


@pytest.mark.parametrize("strategy", ["max", "sum"])
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_splade_is_as_sentence_transformers_encodes(strategy, activation, tmp_path):
    folder = sparse(tmp_path, strategy, activation)
    wanted = encode_sparse(folder)
    assert (wanted > 0).sum() > 20 and (wanted == 0).sum() > 20
    assert np.abs(ask_sparse(folder) - wanted).max() < 1e-5


def test_splade_of_the_older_layout_and_compiled(tmp_path):
    folder = sparse(tmp_path, prompts={"query": "w20 w21 ", "document": ""})
    wanted = encode_sparse(folder, prompt_name="query")
    found = ask_sparse(folder, {"prompt_name": "query"}, backend="turbotx")
    assert np.abs(found - wanted).max() < 1e-5
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
        for i, (path, kind) in enumerate((
            ("", "sparse_encoder.models.MLMTransformer.MLMTransformer"),
            ("1_SpladePooling", "sparse_encoder.models.SpladePooling.SpladePooling"),
        ))
    ]  # fmt: skip
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 30, "do_lower_case": False})
    assert np.abs(ask_sparse(folder, {"prompt_name": "query"}) - wanted).max() < 1e-5
    change_json(folder / "1_SpladePooling" / "config.json", pooling_strategy="mean")
    with pytest.raises(ModelFilesError, match="cannot pool by 'mean'"):
        load_model(str(folder), backend="eager")


def test_splade_of_a_plain_directory(tmp_path):
    wanted = encode_sparse(sparse(tmp_path / "chain"))
    plain = masked(tmp_path / "plain")
    assert np.abs(ask_sparse(plain, pooling="splade") - wanted).max() < 1e-5
    with pytest.raises(ModelFilesError, match="no head of a masked language model"):
        load_model(str(save(tmp_path / "bert", bert())), pooling="splade")
    with pytest.raises(ModelFilesError, match="normalize is for models of one vector"):
        load_model(str(plain), pooling="splade", normalize=True)


def test_a_batch_of_a_sparse_model_has_few_tokens():
    info = ModelInfo("s", "", "float32", 512, 32_768, Head("sparse", "splade"))
    assert info.most_tokens(16_384) == MOST_LOGITS // 32_768 == 2048
    assert info.most_tokens(None) == 2048 and info.most_tokens(100) == 100


def ask_tokens(folder, **options):
    with serve(folder, **options) as client:
        assert "/embed_all" in client.post("/embed", json={"inputs": "w1"}).json()["error"]
        found = client.post("/embed_all", json={"inputs": TEXTS}).json()
        assert client.post("/", json={"inputs": TEXTS}).json() == found
        assert client.get("/info").json()["model_type"] == {"embedding": {"pooling": "none"}}
    return [np.array(rows) for rows in found]


@pytest.mark.parametrize("backend", ["eager", "turbotx"])
def test_every_token_has_its_vector(backend, tmp_path):
    model = bert()
    folder = save(tmp_path / "plain", model)
    wanted = []
    for text in TEXTS:
        inputs = tokenizer()(text, return_tensors="pt")
        with torch.inference_mode():
            wanted.append(model(input_ids=inputs["input_ids"]).last_hidden_state[0].numpy())
    found = ask_tokens(folder, pooling="none", backend=backend)
    assert [f.shape for f in found] == [w.shape for w in wanted]
    assert max(np.abs(f - w).max() for f, w in zip(found, wanted, strict=True)) < 1e-5


def test_a_chain_without_pooling_is_a_model_of_tokens(tmp_path):
    transformer = models.Transformer(str(save(tmp_path / "base", bert())))
    library.SentenceTransformer(modules=[transformer], device="cpu").save(
        str(tmp_path / "saved"), create_model_card=False
    )
    model = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    wanted = [t.numpy() for t in model.encode(TEXTS, output_value="token_embeddings")]
    found = ask_tokens(tmp_path / "saved")
    assert max(np.abs(f - w).max() for f, w in zip(found, wanted, strict=True)) < 1e-5


def test_an_answer_of_very_many_numbers_is_refused_before_it_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr("turbotx.serving.routes.MOST_NUMBERS", 32 * 10)
    with serve(save(tmp_path, bert()), pooling="none") as client:
        assert client.post("/embed_all", json={"inputs": ["w1 w2 w3"] * 2}).status_code == 200
        answer = client.post("/embed_all", json={"inputs": ["w1 w2 w3"] * 3})
    assert answer.status_code == 413 and "480 numbers, at most 320" in answer.json()["error"]
