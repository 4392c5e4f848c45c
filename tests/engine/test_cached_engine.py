"""Generation with a key/value cache: transformers' own loop, every forward through turbotx.

In: tiny decoders of ten families. Out: the tokens that eager gives, whatever the way to choose
them, from one capture a kind of call.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import turbotx
from tests.engine.decoders import (
    FAMILIES,
    VOCABULARY,
    WITH_ENCODER,
    generate,
    make,
    nothing_runs_in_pytorch,  # noqa: F401 - a fixture
    prompt,
)
from turbotx.engine.optimize import engine_of
from turbotx.engine.step_engine import StepEngine
from turbotx.errors import CaptureError, EagerWarning, IndexOutOfRangeError, InputError

transformers = pytest.importorskip("transformers")

WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 4, "do_sample": False},
    "several": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
}
PROMPTS = [(1, 5, 0), (3, 8, 3), (3, 30, 0), (1, 1, 0)]
PADDED = PROMPTS[1:2]


@pytest.fixture
def gpt2():
    model = make("gpt2")
    return model, turbotx.optimize(model)


EACH = [
    pytest.param(name, marks=pytest.mark.sweep if name in ("opt", "marian") else ())
    for name in FAMILIES
]
"""OPT's and Marian's steps are GPT-2's and BART's with other positions."""


@pytest.mark.parametrize("family", EACH)
def test_tokens_are_those_of_eager(family: str) -> None:
    model = make(family)
    fast = turbotx.optimize(model)
    for name, way in WAYS.items():
        for shape in PROMPTS if name == "greedy" or family == "gpt2" else PADDED:
            inputs = prompt(family, *shape)
            assert torch.equal(generate(fast, inputs, **way), generate(model, inputs, **way))
    # With a mask and without one, where there is one; the first step and the further ones.
    kinds = 2 if family != "whisper" else 1
    captures = engine_of(fast).parts["steps"].stats()["captures"]
    assert captures <= (2 if family in WITH_ENCODER else 1) * kinds
    assert fast.stats()["eager_calls"] == 0


def test_tokens_of_gpt2_are_those_of_eager(gpt2) -> None:
    model, fast = gpt2
    for shape in PROMPTS:
        inputs = prompt("gpt2", *shape)
        assert torch.equal(generate(fast, inputs, 6), generate(model, inputs, 6))
    assert fast.stats()["captures"] == 2  # with padding and without


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "gemma"])
def test_one_capture_serves_every_batch_query_and_past(family: str) -> None:
    model = make(family)
    fast = turbotx.optimize(model)
    for batch in (1, 3):
        ours, theirs = (transformers.DynamicCache(config=model.config) for _ in range(2))
        past = 0
        for count in (6, 1, 1, 3, 1, 70, 1):
            ids = torch.randint(2, VOCABULARY, (batch, count))
            mask = torch.ones(batch, past + count, dtype=torch.long)
            mask[0, 0] = 0
            want = model(ids, attention_mask=mask, past_key_values=theirs, use_cache=True)
            got = fast(ids, attention_mask=mask, past_key_values=ours, use_cache=True)
            torch.testing.assert_close(got.logits[:, -1], want.logits[:, -1], rtol=1e-4, atol=1e-5)
            past += count
            assert got.past_key_values is ours and ours.get_seq_length() == past
            for a, b in zip(ours.layers, theirs.layers, strict=True):
                torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(a.values, b.values, rtol=1e-4, atol=1e-5)
    assert fast.stats()["captures"] == 1


@torch.no_grad()
def test_a_step_is_neither_bound_nor_planned_for(gpt2, monkeypatch) -> None:
    model, fast = gpt2
    ids = prompt("gpt2", 1, 100)["input_ids"]
    cache = transformers.DynamicCache()
    fast(ids[:, :5], past_key_values=cache, use_cache=True)
    before = fast.stats()["plans"]
    monkeypatch.setattr(StepEngine, "_find", lambda *_: pytest.fail("looked for a capture again"))
    got = [
        fast(ids[:, k : k + 1], past_key_values=cache, use_cache=True).logits for k in range(5, 100)
    ]
    # One token instead of five, in the first 64 places, in the next, and a cache twice as large.
    assert fast.stats()["plans"] - before <= 3
    torch.testing.assert_close(torch.cat(got, 1), model(ids).logits[:, 5:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_a_cache_goes_on_where_another_left_it(family: str) -> None:
    model = make(family)
    fast = turbotx.optimize(model)
    ids = prompt(family, 2, 24)["input_ids"]
    want = model(ids).logits[:, -1]
    for models in ((model, fast, model, fast), (fast, fast, model, model)):
        cache = transformers.DynamicCache(config=model.config)
        for k, one in enumerate(models):
            step = ids[:, 6 * k : 6 * k + 6]
            got = one(step, past_key_values=cache, use_cache=True).logits[:, -1]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_generate_goes_on_with_a_cache(gpt2) -> None:
    model, fast = gpt2
    inputs = prompt("gpt2", 1, 5)
    found = []
    for one in (model, fast):
        cache = transformers.DynamicCache()
        first = generate(one, inputs, past_key_values=cache)
        more = torch.cat([first, inputs["input_ids"]], 1)
        found.append(generate(one, {"input_ids": more}, past_key_values=cache))
    assert torch.equal(*found)


def test_speculation_takes_tokens_back(gpt2) -> None:
    model, fast = gpt2
    ids = prompt("gpt2", 1, 5)["input_ids"].repeat(1, 3)
    way = {"prompt_lookup_num_tokens": 3, "do_sample": False}
    got = generate(fast, {"input_ids": ids}, **way)
    assert torch.equal(got, generate(model, {"input_ids": ids}, **way))


def test_a_cache_by_place_and_under_inference_mode(gpt2) -> None:
    model, fast = gpt2
    ids = prompt("gpt2", 1, 6)["input_ids"]
    cache = transformers.DynamicCache()
    with torch.inference_mode():
        fast(ids[:, :4], cache, use_cache=True)
        cache.reorder_cache(torch.tensor([0]))
    with torch.no_grad():
        got = fast(ids[:, 4:], cache, use_cache=True)
        cache.reorder_cache(torch.tensor([0]))
        torch.testing.assert_close(got.logits, model(ids).logits[:, 4:])
        assert got.past_key_values is cache
        tuples = fast(ids[:, :1], cache, use_cache=True, return_dict=False)
        assert tuples[1] is cache and cache.get_seq_length() == 7


@torch.no_grad()
def test_two_caches_take_turns(gpt2) -> None:
    model, fast = gpt2
    rows = [prompt("gpt2", 1, n)["input_ids"] for n in (9, 12)]
    caches = [transformers.DynamicCache() for _ in rows]
    got = [
        [fast(r[:, k : k + 3], past_key_values=c, use_cache=True).logits for k in range(0, 9, 3)]
        for r, c in zip(rows, caches, strict=True)
    ]
    for row, logits in zip(rows, got, strict=True):
        torch.testing.assert_close(torch.cat(logits, 1), model(row[:, :9]).logits)


@torch.no_grad()
def test_a_failed_step_leaves_the_cache_as_it_was(gpt2) -> None:
    model, fast = gpt2
    ids = prompt("gpt2", 1, 6)["input_ids"]
    cache = transformers.DynamicCache()
    fast(ids[:, :4], past_key_values=cache, use_cache=True)
    bad = torch.tensor([[VOCABULARY + 5]])
    with pytest.raises(IndexOutOfRangeError):
        fast(bad, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 4
    got = fast(ids[:, 4:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(got, model(ids).logits[:, 4:])


@torch.no_grad()
def test_a_call_that_cannot_be_captured_leaves_the_cache_alone(gpt2, monkeypatch) -> None:
    model, fast = gpt2

    def refuse(self, args, kwargs, outcomes):
        raise CaptureError("cannot capture it")

    monkeypatch.setattr(StepEngine, "capture", refuse)
    cache = transformers.DynamicCache(config=model.config)
    with pytest.raises(CaptureError, match="cannot capture it"):
        fast(torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    assert {type(x).__name__ for x in cache.layers} == {"DynamicLayer"}
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_what_does_not_fit_is_said(gpt2) -> None:
    _, fast = gpt2
    cache = transformers.DynamicCache()
    fast(torch.tensor([[5, 6]]), past_key_values=cache, use_cache=True)
    with pytest.raises(InputError, match="holds a batch of 1, and the call has 3"):
        fast(torch.tensor([[5], [6], [7]]), past_key_values=cache, use_cache=True)
    with cache.layers[0].memory.owned(), pytest.raises(InputError, match="two threads"):
        fast(torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    fast(torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    fixed = transformers.StaticCache(config=fast.config, max_cache_len=16)
    with pytest.raises(InputError, match="StaticCache as past_key_values"):
        fast(torch.tensor([[5]]), past_key_values=fixed, use_cache=True)
    moved = transformers.DynamicCache()
    moved.offloading = True
    with pytest.raises(InputError, match="DynamicCache that is offloaded"):
        fast(torch.tensor([[5]]), past_key_values=moved, use_cache=True)


def test_generate_says_where_a_cache_is_of_another_kind(gpt2) -> None:
    model, fast = gpt2
    inputs = prompt("gpt2", 1, 5)
    way = {"cache_implementation": "static", "disable_compile": True}
    with warnings.catch_warnings():
        warnings.simplefilter("default", EagerWarning)
        with pytest.warns(EagerWarning, match="StaticCache"):
            got = generate(fast, inputs, 3, **way)
    assert torch.equal(got, generate(model, inputs, 3, **way))


@torch.no_grad()
def test_half_precision(gpt2) -> None:
    model, fast = gpt2
    fast.to(torch.bfloat16)
    ids = prompt("gpt2", 2, 7)["input_ids"]
    cache = transformers.DynamicCache()
    fast(ids[:, :6], past_key_values=cache, use_cache=True)
    got = fast(ids[:, 6:], past_key_values=cache, use_cache=True).logits
    assert cache.layers[0].keys.dtype is torch.bfloat16
    torch.testing.assert_close(got, model(ids).logits[:, 6:], rtol=3e-2, atol=3e-2)


class Turns(torch.nn.Module):
    """A norm whose sign is decided by a value of the last token's."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return -self.norm(x) if x[:, -1, 0].sum() > 0 else self.norm(x)


@pytest.mark.filterwarnings("ignore::turbotx.errors.DecisionWarning")
def test_steps_that_decide_by_values() -> None:
    model = make("gpt2")
    model.transformer.ln_f = Turns(model.transformer.ln_f)
    fast = turbotx.optimize(model)
    for shape in ((2, 6, 0), (2, 6, 1), (1, 3, 0)):
        inputs = prompt("gpt2", *shape)
        assert torch.equal(generate(fast, inputs, 8), generate(model, inputs, 8))
    stats = fast.stats()
    assert stats["decided_otherwise"] > 0 and stats["eager_calls"] == 0


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::turbotx.errors.DecisionWarning")
def test_bart_in_float16_looks_for_infinities() -> None:
    model = make("bart").half()
    fast, inputs = turbotx.optimize(model), prompt("bart", 2, 6)
    for scale in (1.0, 6e4):
        model.model.encoder.layers[1].final_layer_norm.weight.mul_(scale)
        assert torch.equal(generate(fast, inputs, 6), generate(model, inputs, 6))
    assert fast.stats()["decided_otherwise"] == 1 and fast.stats()["eager_calls"] == 0


@torch.no_grad()
def test_refresh_reaches_the_encoder_and_the_steps() -> None:
    model = make("t5")
    fast, inputs = turbotx.optimize(model), prompt("t5", 2, 6)
    generate(fast, inputs, 4)
    for layer in (model.encoder.block[0].layer[-1], model.decoder.block[0].layer[-1]):
        layer.DenseReluDense.wi.weight.data[3, 5] += 40.0  # one element, which no sample meets
    fast.refresh()
    assert torch.equal(generate(fast, inputs, 4), generate(model, inputs, 4))
    encoded = [m.get_encoder()(inputs["input_ids"])[0] for m in (fast, model)]
    torch.testing.assert_close(*encoded)


@torch.no_grad()
def test_a_cache_in_hand_answers_as_transformers_own(gpt2) -> None:
    model, fast = gpt2
    ids = prompt("gpt2", 2, 7)["input_ids"]
    ours, theirs = transformers.DynamicCache(), transformers.DynamicCache()
    for one, cache in ((fast, ours), (model, theirs)):
        one(ids, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 1, 1, 0]))
        cache.crop(-2)
        cache.batch_select_indices(torch.tensor([True, False, True, True]))
    kept = copy.deepcopy(ours)
    for cache in (ours, theirs):
        more = torch.tensor([[4], [5], [6]])
        got = fast(more, past_key_values=cache, use_cache=True).logits
        assert cache.get_seq_length() == 6 and len(cache) == 2 and not cache.is_compileable
        want = got if cache is ours else want  # noqa: F821
        torch.testing.assert_close(got, want)
    assert kept.get_seq_length() == 5 and kept.get_max_length() == -1
    torch.testing.assert_close(kept.layers[1].values, ours.layers[1].values[:, :, :5])
    ours.reset()
    assert ours.get_seq_length() == 0 and ours.layers[0].keys is None
    with pytest.raises(ValueError, match="negative"):
        ours.crop(3)
    with pytest.raises(InputError, match="not offloaded"):
        ours.layers[0].offload()
