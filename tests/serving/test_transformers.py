"""Architectures that embed and rank, with random weights: as sentence-transformers runs them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
library = pytest.importorskip("sentence_transformers")

from tests.serving.test_sentence_transformers import chain_of, embed, encode, models, serve  # noqa: E402
from tests.serving.tiny_models import SIZES, TEXTS, change_json, randomize, save, tokenizer  # noqa: E402
from turbotx.serving.model_files import ModelFilesError, load_model  # noqa: E402

DECODER = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "use_cache": True}
T5 = {"vocab_size": SIZES["vocab_size"], "d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 4,
      "d_kv": 8, "pad_token_id": 0}  # fmt: skip


def make(name, **options):
    """A model of a configuration class, random but alike at every call."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    return randomize(transformers.AutoModel.from_config(config))


ENCODERS = {
    "mpnet": lambda: make("MPNet", **{**SIZES, "pad_token_id": 1}),
    "deberta-v2": lambda: make("DebertaV2", **SIZES, relative_attention=True, type_vocab_size=0,
                               pos_att_type=["p2c", "c2p"], position_biased_input=False,
                               share_att_key=True, norm_rel_ebd="layer_norm"),
    "xlm-roberta": lambda: make("XLMRoberta", **{**SIZES, "pad_token_id": 1}, type_vocab_size=1),
    "modernbert": lambda: make("ModernBert", **SIZES),
    "nomic-bert": lambda: make("NomicBert", **SIZES),
    "bert-of-gte-and-e5": lambda: make("Bert", **SIZES),
    "gte-of-modernbert": lambda: make("ModernBert", **SIZES, local_attention=4,
                                      global_attn_every_n_layers=2),
    "albert": lambda: make("Albert", **SIZES, embedding_size=16),
    "t5": lambda: make("T5", **T5),
    "mt5": lambda: make("MT5", **T5),
}  # fmt: skip
DECODERS = {
    "mistral": lambda: make("Mistral", **DECODER, sliding_window=4),
    "qwen2": lambda: make("Qwen2", **DECODER),
    "qwen3": lambda: make("Qwen3", **DECODER),
    "gemma": lambda: make("Gemma", **DECODER),
    "gemma2": lambda: make("Gemma2", **DECODER, sliding_window=4),
    "gemma3": lambda: make("Gemma3Text", **DECODER, sliding_window=4,
                           layer_types=["sliding_attention"]),
    "gemma3-both-ways": lambda: make("Gemma3Text", **DECODER, use_bidirectional_attention=True),
    "llama": lambda: make("Llama", **DECODER),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name, tmp_path):
    folder = chain_of(tmp_path, models.Pooling(32, "mean"), model=ENCODERS[name]())
    found = embed(folder)
    assert np.ptp(found, axis=0).max() > 0.1  # the tokenizer of the class has the words
    assert np.abs(found - encode(folder)).max() < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_pool_the_last_token_on_whichever_side_they_pad(name, side, tmp_path):
    folder = chain_of(
        tmp_path, models.Pooling(32, "lasttoken"), models.Normalize(), model=DECODERS[name]()
    )  # fmt: skip
    if name == "qwen2":  # its class makes a tokenizer of bytes, whatever the files hold
        letters = "Ġ0123456789Wwnothig"
        vocabulary = {letter: i + 4 for i, letter in enumerate(letters)}
        bytes_ = transformers.Qwen2Tokenizer(
            vocab={"<|endoftext|>": 0, **vocabulary}, merges=[], pad_token="<|endoftext|>",
            model_max_length=30,
        )  # fmt: skip
        bytes_.save_pretrained(folder)
    change_json(folder / "tokenizer_config.json", padding_side=side)
    together = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    found = embed(folder)
    assert np.ptp(found, axis=0).max() > 0.1  # the tokenizer of the class has the words
    assert np.abs(found - together).max() < 1e-5
    assert np.abs(found - encode(folder)).max() < 1e-5


@pytest.mark.parametrize("name", ["mpnet", "deberta-v2", "qwen3"])
def test_compiled(name, tmp_path):
    pooling = "lasttoken" if name in DECODERS else "mean"
    folder = chain_of(tmp_path, models.Pooling(32, pooling), model={**ENCODERS, **DECODERS}[name]())
    assert np.abs(embed(folder, backend="turbotx") - encode(folder)).max() < 1e-5


def heads(name, **options):
    torch.manual_seed(2)
    config = getattr(transformers, f"{name}Config")(**options)
    return randomize(transformers.AutoModelForSequenceClassification.from_config(config))


PAIRS = [("w1 w2", text) for text in TEXTS]


@pytest.mark.parametrize(
    "name, options",
    [("Bert", {}), ("Roberta", {"pad_token_id": 1}), ("DebertaV2", {"type_vocab_size": 0}),
     ("ModernBert", {}), ("Qwen3", {"num_key_value_heads": 2})],
)  # fmt: skip
def test_cross_encoders_score_as_sentence_transformers_does(name, options, tmp_path):
    folder = save(tmp_path / "base", heads(name, **{**SIZES, **options}, num_labels=1))
    whole = library.CrossEncoder(str(folder), device="cpu")
    whole.save(str(tmp_path / "saved"), create_model_card=False)
    wanted = [float(whole.predict([pair])[0]) for pair in PAIRS]
    for place in (folder, tmp_path / "saved"):
        with serve(place) as client:
            ranks = client.post("/rerank", json={"query": "w1 w2", "texts": TEXTS}).json()
        found = [r["score"] for r in sorted(ranks, key=lambda r: r["index"])]
        assert np.ptp(found) > 1e-3
        assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", ["Qwen3", "GPT2"])
def test_a_decoders_head_without_a_pad_token_takes_whole_batches(name, tmp_path):
    sizes = {"n_head": 4} if name == "GPT2" else {"num_key_value_heads": 2}
    model = heads(name, **{**SIZES, "pad_token_id": None}, **sizes, num_labels=1)
    folder = save(tmp_path, model)
    with serve(folder) as client:
        body = {"query": "w1 w2", "texts": TEXTS, "raw_scores": True}
        ranks = client.post("/rerank", json=body).json()
    found = [r["score"] for r in sorted(ranks, key=lambda r: r["index"])]
    for score, pair in zip(found, PAIRS, strict=True):
        inputs = tokenizer()(*pair, return_tensors="pt")
        with torch.inference_mode():
            wanted = model(input_ids=inputs["input_ids"]).logits
        assert score == pytest.approx(float(wanted), abs=1e-5)


def test_a_class_may_be_one_of_many_or_on_its_own(tmp_path):
    alone = heads("Bert", **SIZES, num_labels=3, problem_type="multi_label_classification")
    with serve(save(tmp_path / "alone", alone)) as client:
        found = client.post("/predict", json={"inputs": "w1 w2"}).json()
        raw = client.post("/predict", json={"inputs": "w1 w2", "raw_scores": True}).json()
    logits = {r["label"]: r["score"] for r in raw}
    wanted = {label: 1 / (1 + np.exp(-x)) for label, x in logits.items()}
    assert {r["label"]: r["score"] for r in found} == pytest.approx(wanted, abs=1e-5)


def test_weights_that_lack_something_are_refused(tmp_path):
    folder = save(tmp_path, make("Bert", **SIZES))
    change_json(folder / "config.json", num_hidden_layers=2)
    with pytest.raises(ModelFilesError, match=r"encoder\.layer\.1.* and others: they"):
        load_model(str(folder), backend="eager")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelFilesError, match="cannot be loaded: SafetensorError"):
        load_model(str(folder), backend="eager")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFilesError, match="cannot be loaded"):
        load_model(str(folder), backend="eager")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelFilesError, match=r"config\.json"):
        load_model(str(folder), backend="eager")


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    make("Bert", **SIZES).save_pretrained(tmp_path)
    with pytest.raises(ModelFilesError, match="has no tokenizer"):
        load_model(str(tmp_path), backend="eager")


def test_an_encoder_with_a_decoder_that_is_not_known_is_refused(tmp_path):
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32,
             "decoder_ffn_dim": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4}  # fmt: skip  # noqa: E501
    model = make("Bart", vocab_size=SIZES["vocab_size"], pad_token_id=0, **sizes)
    with pytest.raises(ModelFilesError, match="bart, an encoder with a decoder"):
        load_model(str(save(tmp_path, model)), backend="eager")
