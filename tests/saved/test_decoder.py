"""Saved decoders: `generate` by the programs of a file, in a process without a compiler too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import turbotx
from tests.engine.decoders import make, prompt
from turbotx.errors import CacheFullError, InputError, SavedFileError

transformers = pytest.importorskip("transformers")

WAYS = ({"do_sample": True, "top_k": 20}, {"num_beams": 3, "do_sample": False})
GENERATE = """
import sys, torch, turbotx
fast, (calls, want) = turbotx.load(sys.argv[1]), torch.load(sys.argv[2])
got = [(torch.manual_seed(5), fast.generate(**call))[1] for call in calls]
assert all(map(torch.equal, got, want)), (got, want)
assert fast.stats()["kernel_builds"] == 0
"""


def generate(model, call):
    torch.manual_seed(5)
    return model.generate(**call)


def saved(family: str, path, **options):
    """Return a file, a model and what it generates, by turbotx before it was saved."""
    model = make(family)
    fast = turbotx.optimize(model, **options)
    count = {"max_new_tokens": 6, "min_new_tokens": 6}
    shapes = ((2, 6), (1, 1))  # sampled, and by beams
    calls = [{**prompt(family, *s), **w, **count} for s, w in zip(shapes, WAYS, strict=True)]
    want = [generate(fast, call) for call in calls]
    turbotx.save(fast, path)
    return model, calls, want


@pytest.mark.parametrize("family", ["gpt2", "gemma", "t5", "whisper"])
def test_a_saved_decoder_generates(family: str, tmp_path) -> None:
    model, calls, want = saved(family, tmp_path / "model.ttx")
    fast = turbotx.load(tmp_path / "model.ttx")
    for call, tokens in zip(calls, want, strict=True):
        assert torch.equal(generate(fast, call), tokens)
        assert torch.equal(generate(model, call), tokens)
    stats = fast.stats()
    assert stats["kernel_builds"] == 0 and stats["cache_peak_nbytes"] > stats["cache_nbytes"] == 0
    assert set(fast.state_dict()) == set(model.state_dict())


def test_it_generates_without_a_compiler(tmp_path) -> None:
    _, calls, want = saved("gpt2", tmp_path / "model.ttx")
    torch.save((calls, want), tmp_path / "calls.pt")
    files = [str(tmp_path / name) for name in ("model.ttx", "calls.pt")]
    cache = tmp_path / "cache"
    environment = {**os.environ, "PATH": "", "CXX": "", "TURBOTX_CACHE_DIR": str(cache)}
    subprocess.run([sys.executable, "-c", GENERATE, *files], env=environment, check=True)


@torch.no_grad()
def test_steps_and_changes_of_weights(tmp_path) -> None:
    model, ids = make("gpt2"), prompt("gpt2", 2, 5)["input_ids"]
    fast = turbotx.optimize(model)
    fast(ids, past_key_values=transformers.DynamicCache(), use_cache=True)
    turbotx.save(fast, tmp_path / "model.ttx")
    fast = turbotx.load(tmp_path / "model.ttx", weights=model)
    for _ in range(2):
        cache = transformers.DynamicCache()
        fast(ids[:, :4], past_key_values=cache, use_cache=True)
        got = fast(ids[:, 4:], past_key_values=cache, use_cache=True)
        assert got.past_key_values is cache and cache.get_seq_length() == 5
        torch.testing.assert_close(got.logits, model(ids).logits[:, 4:])
        model.transformer.h[0].mlp.c_fc.weight.mul_(1.5)


def test_what_a_file_does_not_hold_is_said(tmp_path) -> None:
    model, calls, _ = saved("gpt2", tmp_path / "model.ttx", max_cache_nbytes=6 * 64 * 512)
    fast = turbotx.load(tmp_path / "model.ttx")
    with pytest.raises(InputError, match="holds no call of this kind"):
        fast.generate(**calls[0], output_attentions=True, return_dict_in_generate=True)
    with pytest.raises(CacheFullError):
        fast.generate(**{**calls[0], "num_beams": 8})
    encoder = turbotx.optimize(model)
    encoder(calls[0]["input_ids"], use_cache=False)
    turbotx.save(encoder, tmp_path / "plain.ttx")
    with pytest.raises(InputError, match="no calls with a key/value cache"):
        turbotx.load(tmp_path / "plain.ttx").generate(calls[0]["input_ids"])


def test_a_class_that_cannot_be_imported_is_named(tmp_path) -> None:
    cls = type("Odd", (transformers.GPT2LMHeadModel,), {"__module__": "nowhere_to_be_found"})
    model = make("gpt2")
    model.__class__ = cls
    fast = turbotx.optimize(model)
    fast.generate(**prompt("gpt2", 1, 4), max_new_tokens=2)
    turbotx.save(fast, tmp_path / "model.ttx")
    with pytest.raises(SavedFileError, match="nowhere_to_be_found:Odd"):
        turbotx.load(tmp_path / "model.ttx").generate(**prompt("gpt2", 1, 4))
