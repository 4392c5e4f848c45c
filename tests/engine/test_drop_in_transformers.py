"""transformers' own ways to use a model: generate, pipelines, Trainer, save_pretrained.

In: tiny random models of every kind of head, plain and optimized. Out: equal results, through
turbotx where it takes the call, with one warning where it does not, and nobody's "not supported".
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path

import pytest
import torch

import turbotx
from tests.engine.decoders import make, prompt
from turbotx.errors import CaptureError, EagerWarning

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

IDS = torch.tensor([[5, 9, 7, 11], [6, 5, 12, 8]])
SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def bert(head: str):
    config = transformers.BertConfig(**SMALL, intermediate_size=32)
    return getattr(transformers, head)(config).eval()


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config).eval()


def t5():
    config = transformers.T5Config(
        vocab_size=30, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.fixture
def tokenizer():
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "a",
        "cat",
        "dog",
        "sat",
        "on",
        "mat",
        "runs",
    ]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", mask_token="[MASK]"
    )


@pytest.mark.parametrize("make", [gpt2, t5])
def test_generate_goes_through_where_there_is_no_cache(make) -> None:
    model = make()
    fast = turbotx.optimize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EagerWarning)
        ours = fast.generate(IDS, use_cache=False, **GREEDY)
    assert torch.equal(ours, model.generate(IDS, use_cache=False, **GREEDY))
    assert fast.stats()["captures"] >= 1
    assert fast.stats()["eager_calls"] == 0
    if make is t5:
        encoder = fast.get_encoder()
        assert encoder.stats()["captures"] == 1
        assert encoder.block is model.encoder.block
        assert model.get_encoder() is model.encoder


@torch.no_grad()
@torch.no_grad()
def test_a_call_of_a_decoder_gives_a_cache_as_it_does_itself() -> None:
    model = gpt2()
    fast = turbotx.optimize(model)
    for _ in range(2):
        got, want = fast(IDS), model(IDS)
        torch.testing.assert_close(got.logits, want.logits)
        ours, theirs = got.past_key_values, want.past_key_values
        assert type(ours) is type(theirs) and ours.get_seq_length() == IDS.shape[1]
        torch.testing.assert_close(ours.layers[0].keys, theirs.layers[0].keys)
    assert fast.stats()["captures"] == 1 and fast.stats()["eager_calls"] == 0
    with pytest.raises(CaptureError, match="use_cache=False"):
        fast(IDS, labels=IDS)


@pytest.mark.parametrize(
    ("task", "head"),
    [
        ("feature-extraction", "BertModel"),
        ("text-classification", "BertForSequenceClassification"),
        ("fill-mask", "BertForMaskedLM"),
    ],
)
def test_pipelines(task: str, head: str, tokenizer, caplog) -> None:
    model = bert(head)
    fast = turbotx.optimize(model)
    logging.getLogger("transformers").propagate = True
    text = "the [MASK] sat on a mat"
    caplog.clear()
    ours = transformers.pipeline(task, model=fast, tokenizer=tokenizer)(text)
    assert "not supported" not in caplog.text
    theirs = transformers.pipeline(task, model=model, tokenizer=tokenizer)(text)
    if task == "feature-extraction":
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5)
    else:
        assert [x.get("label") for x in ours] == [x.get("label") for x in theirs]
        assert ours[0]["score"] == pytest.approx(theirs[0]["score"], rel=1e-4)
    assert fast.stats()["captures"] == 1
    assert fast.stats()["eager_calls"] == 0


@torch.no_grad()
def test_saving_as_the_model_itself(tmp_path: Path) -> None:
    fast = turbotx.optimize(bert("BertModel"))
    right = fast(IDS)[0]
    fast.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is transformers.BertModel
    assert loaded.config.architectures == ["BertModel"]
    torch.testing.assert_close(loaded(IDS)[0], right, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="Trainer needs it")
def test_trainer_predicts(tmp_path: Path) -> None:
    model = bert("BertForSequenceClassification")
    fast = turbotx.optimize(model)
    rows = [{"input_ids": row, "labels": k} for k, row in enumerate(IDS.tolist())]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, per_device_eval_batch_size=1
    )
    ours, theirs = (
        torch.tensor(transformers.Trainer(model=m, args=arguments).predict(rows).predictions)
        for m in (fast, model)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert fast.stats()["captures"] == 1


@torch.no_grad()
def test_peft_around_and_inside() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    model = peft.get_peft_model(bert("BertModel"), config).eval()
    fast = turbotx.optimize(model)
    assert isinstance(fast, peft.PeftModel)
    for out in (fast(input_ids=IDS)[0], fast.merge_and_unload()(IDS)[0]):
        torch.testing.assert_close(out, model(input_ids=IDS)[0], rtol=1e-4, atol=1e-5)
    inner = turbotx.optimize(bert("BertModel"))
    around = peft.get_peft_model(inner, config).eval()
    right = transformers.BertModel.forward(inner, IDS)[0]
    torch.testing.assert_close(around(input_ids=IDS)[0], right, rtol=1e-4, atol=1e-5)
    assert inner.stats()["captures"] == 1


@pytest.mark.parametrize(("family", "target"), [("gpt2", "c_attn"), ("t5", "q")])
def test_peft_generates(family: str, target: str) -> None:
    peft = pytest.importorskip("peft")
    kind = {"gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}[family]
    config = peft.LoraConfig(target_modules=[target], init_lora_weights=False, task_type=kind)
    model = peft.get_peft_model(make(family), config).eval()
    fast = turbotx.optimize(model)
    given = {**prompt(family, 2, 6), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(fast.generate(**given), model.generate(**given))
    assert fast.stats()["captures"] > 0 and fast.stats()["eager_calls"] == 0
    with model.disable_adapter():
        assert torch.equal(fast.generate(**given), model.generate(**given))
    assert fast.stats()["eager_calls"] == 0


def sentence_model(tokenizer, folder: Path):
    models = pytest.importorskip("sentence_transformers.models")
    bert("BertModel").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    first = models.Transformer(str(folder))
    library = importlib.import_module("sentence_transformers")
    return library.SentenceTransformer(modules=[first, models.Pooling(16)], device="cpu").eval()


TEXTS = ["the cat", "a dog sat on the mat"]


@pytest.mark.parametrize("way", ["assigned", "in place"])
def test_the_transformer_of_a_sentence_transformer(way: str, tokenizer, tmp_path: Path) -> None:
    model = sentence_model(tokenizer, tmp_path)
    right = model.encode(TEXTS)
    if way == "assigned":
        model[0].auto_model = turbotx.optimize(model[0].auto_model)
    else:
        turbotx.optimize(model[0].auto_model, in_place=True)
    torch.testing.assert_close(
        torch.tensor(model.encode(TEXTS)), torch.tensor(right), rtol=1e-4, atol=1e-5
    )
    assert model[0].auto_model.stats()["captures"] == 1


def test_a_sentence_transformer(tokenizer, tmp_path: Path) -> None:
    model = sentence_model(tokenizer, tmp_path)
    fast = turbotx.optimize(model)
    for texts in (TEXTS, TEXTS[:1]):
        ours, theirs = torch.tensor(fast.encode(texts)), torch.tensor(model.encode(texts))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert isinstance(fast, type(model))
    assert fast.stats()["captures"] == 1
    assert fast.stats()["eager_calls"] == 0
    assert type(model[0].auto_model) is transformers.BertModel
    features = model.preprocess(TEXTS)
    assert fast(features) is features
    assert "sentence_embedding" in features
