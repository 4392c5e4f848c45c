"""Directories of sentence-transformers: the server's vectors are those of its own ``encode``."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

library = pytest.importorskip("sentence_transformers")

from tests.serving.test_app import client_of  # noqa: E402
from tests.serving.tiny_models import (  # noqa: E402
    TEXTS,
    bert,
    change_json,
    save,
    to_older_layout,
    write_json,
)
from turbotx.serving.cost import CostTable  # noqa: E402
from turbotx.serving.model_files import ModelFilesError, load_model  # noqa: E402
from turbotx.serving.service import Service  # noqa: E402
from turbotx.serving.settings import Settings  # noqa: E402

models = importlib.import_module("sentence_transformers.models")
LAYERS = "sentence_transformers.sentence_transformer.modules.layer_norm"
LayerNorm = importlib.import_module(LAYERS).LayerNorm


def chain_of(folder, *modules, model=None, length=30, **options):
    """Save a model with these modules after its transformer; ``options`` are the model's."""
    save(folder / "base", model or bert(), length=length)
    transformer = models.Transformer(str(folder / "base"))
    whole = library.SentenceTransformer(
        modules=[transformer, *modules], device="cpu", **options
    )  # fmt: skip
    whole.save(str(folder / "saved"), create_model_card=False)
    return folder / "saved"


def encode(folder, texts=TEXTS, **options):
    model = library.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return np.stack([model.encode(text, **options) for text in texts])


def serve(folder, backend="eager", settings=None, **choices):
    model = load_model(str(folder), backend=backend, **choices)
    costs = CostTable.from_function(lambda n, b: 1.0, model.info.max_length, 8)
    settings = Settings(max_batch=8, max_batch_tokens=None, cache_nbytes=0, **(settings or {}))
    return client_of(Service(model, settings, costs))


def embed(folder, texts=TEXTS, body=None, **options):
    with serve(folder, **options) as client:
        answer = client.post("/embed", json={"inputs": texts, "truncate": True, **(body or {})})
        assert answer.status_code == 200, answer.text
        info = client.get("/info").json()
    found = np.array(answer.json())
    assert found.shape[1] == info["width"]
    return found


@pytest.mark.parametrize("older", [False, True], ids=["today", "older"])
@pytest.mark.parametrize(
    "modes",
    ["mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken",
     ("mean", "weightedmean", "cls")],
    ids=str,
)  # fmt: skip
def test_every_pooling_in_both_layouts(modes, older, tmp_path):
    folder = chain_of(tmp_path, models.Pooling(32, modes))
    if older:
        to_older_layout(folder)
    assert np.abs(embed(folder) - encode(folder)).max() < 1e-5


def dense(*sizes, **options):
    torch.manual_seed(1)
    return models.Dense(*sizes, **options)


@pytest.mark.parametrize("older", [False, True], ids=["today", "older"])
def test_a_long_chain_is_one_compiled_module(older, tmp_path):
    folder = chain_of(
        tmp_path,
        models.Pooling(32, ("cls", "mean")),
        dense(64, 24, activation_function=torch.nn.GELU()),
        models.Normalize(),
        LayerNorm(24),
        dense(24, 16, bias=False, activation_function=torch.nn.Identity()),
        models.Normalize(),
    )
    if older:
        to_older_layout(folder)
    assert np.abs(embed(folder, backend="turbotx") - encode(folder)).max() < 1e-5


@pytest.mark.parametrize("sizes", [(32, 32), (32, 8)])
def test_a_projection_may_add_what_it_was_given(sizes, tmp_path):
    folder = chain_of(tmp_path, models.Pooling(32), dense(*sizes, use_residual=True))
    assert np.abs(embed(folder) - encode(folder)).max() < 1e-5


def test_normalising_is_the_requests_choice(tmp_path):
    folder = chain_of(tmp_path, models.Pooling(32), models.Normalize())
    raw = embed(folder, body={"normalize": False})
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.1
    found = embed(folder)
    assert np.abs(found - raw / np.linalg.norm(raw, axis=1, keepdims=True)).max() < 1e-5


def test_a_length_that_the_files_say_cuts_as_the_model_does(tmp_path):
    folder = chain_of(tmp_path, models.Pooling(32), length=8)
    texts = ["w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11"]
    wanted = encode(folder, texts)
    assert np.abs(embed(folder, texts) - wanted).max() < 1e-5
    to_older_layout(folder)
    assert load_model(str(folder), backend="eager").info.max_length == 8
    assert np.abs(embed(folder, texts) - wanted).max() < 1e-5


def test_dimensions_that_the_files_cut_to(tmp_path):
    folder = chain_of(tmp_path, models.Pooling(32), models.Normalize(), truncate_dim=12)
    found = embed(folder)
    assert found.shape[1] == 12
    assert np.abs(found - encode(folder)).max() < 1e-5


def test_letters_are_lowered_where_the_files_say_so(tmp_path):
    folder = chain_of(tmp_path, models.Pooling(32))
    as_they_are = embed(folder)
    change_json(folder / "sentence_bert_config.json", do_lower_case=True)
    found = embed(folder)
    assert np.abs(found[3] - as_they_are[3]).max() > 0.01
    assert np.abs(found - encode(folder)).max() < 1e-5


PROMPTS = {"query": "w20 w21 ", "document": "w30 "}


def test_prompts_by_default_and_by_name(tmp_path):
    folder = chain_of(
        tmp_path, models.Pooling(32), prompts=PROMPTS, default_prompt_name="document"
    )  # fmt: skip
    assert np.abs(embed(folder) - encode(folder)).max() < 1e-5
    query = encode(folder, prompt_name="query")
    assert np.abs(query - encode(folder)).max() > 0.01
    assert np.abs(embed(folder, body={"prompt_name": "query"}) - query).max() < 1e-5
    assert np.abs(embed(folder, default_prompt_name="query") - query).max() < 1e-5
    assert np.abs(embed(folder, default_prompt="w20 w21 ") - query).max() < 1e-5
    with serve(folder) as client:
        openai = client.post("/v1/embeddings", json={"input": TEXTS}).json()["data"]
        for body, says in (({"inputs": "w1", "prompt_name": "code"}, "document, query"),
                           ({"inputs": [[5]], "prompt_name": "query"}, "texts")):  # fmt: skip
            answer = client.post("/embed", json=body)
            assert answer.status_code == 422 and says in answer.json()["error"]
    assert np.abs([d["embedding"] for d in openai] - encode(folder)).max() < 1e-5
    for wrong in ({"default_prompt_name": "code"}, {"default_prompt": "a", "default_prompt_name": "query"}):  # fmt: skip  # noqa: E501
        with pytest.raises(ModelFilesError, match="prompt"):
            load_model(str(folder), backend="eager", **wrong)


def test_a_plain_directory_pools_as_sentence_transformers_does(tmp_path):
    folder = save(tmp_path, bert())
    assert np.abs(embed(folder) - encode(folder)).max() < 1e-5


def modules_with(name):
    def change(folder):
        entries = [{"type": f"sentence_transformers.models.{kind}", "path": path}
                   for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"))]  # fmt: skip
        write_json(folder / "modules.json", [*entries, {"type": name, "path": "1_Pooling"}])

    return change


def options_with(path, **fields):
    return lambda folder: change_json(folder / path, **fields)


ROOT = "config_sentence_transformers.json"
BERT = "sentence_bert_config.json"


@pytest.mark.parametrize(
    "change, says",
    [
        (modules_with("sentence_transformers.models.LSTM"), "models.LSTM"),
        (modules_with("custom_st.Projection"), "custom_st.Projection"),
        (modules_with("sentence_transformers.models.SpladePooling"), "feature-extraction"),
        (modules_with("sentence_transformers.models.WeightedLayerPooling"), "WeightedLayerPooling"),
        (modules_with("sentence_transformers.models.Pooling"), "Pooling takes"),
        (lambda folder: write_json(folder / "modules.json", []), "begins with nothing"),
        (lambda folder: write_json(folder / "modules.json", {}), "a dict, not a list"),
        (lambda folder: (folder / "modules.json").write_text("[{"), "cannot read"),
        (options_with("1_Pooling/config.json", pooling_mode="median"), "median"),
        (options_with("1_Pooling/config.json", layers=[1, 2]), "layers"),
        (options_with("1_Pooling/config.json", embedding_dimension=None), "embedding_dimension"),
        (options_with(ROOT, model_type="SparseEncoder"), "SparseEncoder"),
        (options_with(ROOT, prompts={}, default_prompt_name="query"), "default_prompt_name"),
        (options_with(ROOT, rotation=3), "rotation"),
        (options_with(BERT, query_expansion={"strategy": "fixed", "length": 4}), "query_expansion"),
        (options_with(BERT, model_args={"num_hidden_layers": 1}), "num_hidden_layers"),
        (options_with(BERT, modality_config={"message": {}}), "message"),
        (options_with(BERT, transformer_task="fill-mask"), "fill-mask"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(change, says, tmp_path):
    folder = chain_of(tmp_path, models.Pooling(32))
    change(folder)
    with pytest.raises(ModelFilesError, match=says):
        load_model(str(folder), backend="eager")


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"activation_function": "os.system"}, "os.system"),
        ({"activation_function": "torch.nn.modules.rnn.LSTM"}, "LSTM"),
        ({"activation_function": "torch.nn.functional.gelu"}, "gelu"),
        ({"in_features": 31}, "Dense takes vectors of 31, but gets 32"),
        ({"module_input_name": "token_embeddings"}, "module_input_name"),
    ],
)
def test_projections_that_are_not_served(fields, says, tmp_path):
    folder = chain_of(tmp_path, models.Pooling(32), dense(32, 8))
    change_json(folder / "2_Dense" / "config.json", **fields)
    with pytest.raises(ModelFilesError, match=says):
        load_model(str(folder), backend="eager")
