"""Step engine: what looks at steps (explain, verify, profile, dumps), changes of dtype, bounds."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import turbotx
from tests.engine.decoders import make, prompt
from turbotx.errors import CacheFullError, EagerWarning, InputError

transformers = pytest.importorskip("transformers")


def generate(model, count: int = 6, batch: int = 2):
    return model.generate(**prompt("gpt2", batch, 5), max_new_tokens=count, min_new_tokens=count)


def a_step(model, past: int = 5, count: int = 1):
    """Return the arguments of a step behind `past` tokens, which the model itself has made."""
    ids = prompt("gpt2", 2, past + count)["input_ids"]
    cache = transformers.DynamicCache(config=model.config)
    model(ids[:, :past], past_key_values=cache, use_cache=True)
    return {"input_ids": ids[:, past:], "past_key_values": cache, "use_cache": True}


@torch.no_grad()
def test_a_step_is_explained_verified_and_profiled_and_its_cache_left_alone(tmp_path):
    model = make("llama")
    call = a_step(model)
    report = turbotx.explain(model, **call)
    shown = {name: report.dims[name] for name in ("batch", "seq", "length", "capacity")}
    assert shown == {"batch": 2, "seq": 1, "length": 6, "capacity": 64}
    token = 2 * 2 * model.config.num_hidden_layers * 16 * 2  # two of the four heads
    assert report.cache.token_nbytes == token
    assert report.cache.filled_nbytes == 2 * 6 * token and report.cache.nbytes == 2 * 64 * token
    assert "Key/value cache" in str(report) and "Key/value cache" in report._repr_html_()
    numerics = report.numerics(model, **call)
    assert numerics.holds and len(numerics.launches) > 10 and len(numerics.outputs) == 1
    assert report.profile(**call, runs=2).total_us > 0
    assert all(e.holds for errors in report.stress(**call).values() for e in errors)
    assert (report.dump(tmp_path).folder / "report.html").exists()
    assert {type(x).__name__ for x in call["past_key_values"].layers} == {"DynamicLayer"}
    assert call["past_key_values"].get_seq_length() == 5


@torch.no_grad()
@pytest.mark.parametrize(("family", "count"), [("gpt2", 7), ("llama", 8)])
def test_a_step_takes_as_many_launches_a_layer_as_a_call_without_a_cache(family, count) -> None:
    """Attention stores the new rows itself."""
    made = []
    for layers in (1, 2):
        config = copy.deepcopy(make(family).config)
        config.num_hidden_layers, config.layer_types = layers, None
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        step = turbotx.explain(model, **a_step(model)).launches
        assert not [x for x in step if x.kind == "store"]
        plain = turbotx.explain(model, **prompt(family, 2, 5), use_cache=False).launches
        made.append((len(step), len(plain)))
    assert {more - fewer for fewer, more in zip(*made, strict=True)} == {count}


@torch.no_grad()
def test_a_report_sees_a_wrong_past() -> None:
    model = make("gpt2")
    call = a_step(model)
    report = turbotx.explain(model, **call)
    plain = report.plain_call((), call)[1]
    right = model(**call).logits
    logits = report.compiled.program.run
    values = [v for v in plain.values() if isinstance(v, torch.Tensor)]
    binding = report.compiled.program.bind(tuple(report.dims.values()))
    torch.testing.assert_close(logits(binding, values)[0], right)
    plain["kv_memory"].zero_()
    assert not torch.allclose(logits(binding, values)[0], right)


@torch.no_grad()
def test_a_step_is_a_range_of_the_profiler() -> None:
    model = make("gpt2")
    fast, call = turbotx.optimize(model), a_step(model)
    with torch.profiler.profile() as found:
        fast(**call)
    assert "turbotx: GPT2LMHeadModel step" in {event.name for event in found.events()}
    assert "cache_store" in str(fast.graph.graph)
    with pytest.raises(InputError, match="without a key/value cache"):
        fast.reserve(batch=4)


@torch.no_grad()
def test_dumps_and_verification_look_at_steps(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TURBOTX_DUMP", str(tmp_path))
    monkeypatch.setenv("TURBOTX_VERIFY", "1")
    model = make("gpt2")
    assert torch.equal(generate(turbotx.optimize(model)), generate(model))
    assert (tmp_path / "GPT2LMHeadModel_0" / "report.html").exists()


def test_autocast_and_conversions_change_what_a_cache_holds() -> None:
    model = make("gpt2")
    fast = turbotx.optimize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EagerWarning)
        for _ in range(2):
            assert torch.equal(generate(fast), generate(model))
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(generate(fast), generate(model))
        model.to(torch.bfloat16)
        assert generate(fast).shape == generate(model).shape  # near ties: other tokens may win
        model.float()
        assert torch.equal(generate(fast), generate(model))


@torch.no_grad()
def test_keys_and_values_of_two_dtypes_are_refused_by_name() -> None:
    model = make("gemma")
    fast, call = turbotx.optimize(model), a_step(model)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(
        turbotx.errors.CaptureError, match="layers write"
    ):  # fmt: skip
        fast(**call)


def test_caches_are_counted_and_bounded() -> None:
    model = make("gpt2")
    token = 2 * 2 * 32 * 4
    fast = turbotx.optimize(model, max_cache_nbytes=2 * 64 * token)
    kept = fast.generate(**prompt("gpt2", 1, 5), max_new_tokens=3, return_dict_in_generate=True)
    stats = fast.stats()
    assert stats["cache_nbytes"] == stats["cache_peak_nbytes"] == 64 * token
    with pytest.raises(CacheFullError, match=f"hold {64 * token} bytes, and {128 * token} more"):
        generate(fast)
    assert fast.stats()["cache_nbytes"] == 64 * token
    del kept
    assert fast.stats()["cache_nbytes"] == 0
    assert torch.equal(generate(fast), generate(model))
    assert fast.stats()["cache_peak_nbytes"] == 128 * token
