"""Every architecture that docs/architectures.md lists is captured without a call that PyTorch runs,
in every dtype, in bfloat16 by the sweep."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import turbotx
from benchmarks.parity import ARCHITECTURES, make_inputs
from tests.models import (
    assert_as_exact_as_eager,
    in_double,
    leaves,
    small_model,
    token_inputs,
)
from turbotx.errors import DecisionWarning, EagerWarning

# Of float16's casts and constants bfloat16 has other values only: the sweep has it too.
DTYPES = (
    torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.sweep),
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_captured_once_for_all_shapes(architecture: str, dtype: torch.dtype) -> None:
    model = small_model(architecture, dtype, layers=1)
    fast = turbotx.optimize(model, backend="aten")
    for batch, seq in ((2, 9), (1, 1)):
        inputs = make_inputs(model, batch, seq, dtype)
        with torch.no_grad():
            expected = leaves(model(**inputs))
        for ours, theirs in zip(leaves(fast(**inputs)), expected, strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    stats = fast.stats()
    assert (stats["captures"], stats["eager_calls"], stats["decided_otherwise"]) == (1, 0, 0)


@pytest.mark.parametrize("architecture", ["xlm", "flaubert", "bart"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_those_that_decide_by_values_are_exact(architecture: str, dtype: torch.dtype) -> None:
    model = small_model(architecture, dtype)
    exact, fast = in_double(model), turbotx.optimize(model)
    for batch, seq in ((2, 9), (1, 1), (3, 4), (1, 6)):
        inputs = make_inputs(model, batch, seq, dtype)
        with torch.no_grad():
            assert_as_exact_as_eager(fast(**inputs), model(**inputs), exact(**inputs))
    stats = fast.stats()
    assert (stats["captures"], stats["eager_calls"], stats["decided_otherwise"]) == (1, 0, 0)


@pytest.mark.parametrize("architecture", ["xlm", "flaubert"])
def test_an_assertion_of_theirs_that_fails_is_theirs(architecture: str) -> None:
    model = small_model(architecture)
    fast = turbotx.optimize(model, backend="aten")
    inputs: dict[str, Any] = {"input_ids": torch.randint(3, 150, (2, 5))}
    for longest in (5, 3, 6, 5):
        inputs["lengths"] = torch.tensor([longest, 2])
        if longest == 6:
            with pytest.warns(EagerWarning, match="assert lengths"), pytest.raises(AssertionError):
                fast(**inputs)
            continue
        with torch.no_grad():
            expected = model(**inputs)[0]
        torch.testing.assert_close(fast(**inputs)[0], expected)
    stats = fast.stats()
    assert (stats["captures"], stats["eager_calls"]) == (1, 1)


def test_bart_clamps_in_float16_where_something_is_infinite() -> None:
    model = small_model("bart", torch.float16)
    fast = turbotx.optimize(model, backend="aten")
    inputs = make_inputs(model, 2, 5, torch.float16)
    del inputs["input_ids"]
    usual, large = torch.randn(2, 2, 5, 64).half()
    broken = large.clone()
    broken[1, 2, 3] = float("inf")
    for embeds in (usual, broken, usual, broken):
        inputs["inputs_embeds"] = embeds
        with torch.no_grad():
            expected = model(**inputs)[0]
        if embeds is broken and fast.stats()["captures"] == 1:
            with pytest.warns(DecisionWarning, match=r"modeling_bart.py:\d+: if .*isfinite"):
                fast(**inputs)
        torch.testing.assert_close(fast(**inputs)[0], expected, equal_nan=True)
    stats = fast.stats()
    assert stats["captures"] == 2 and stats["eager_calls"] == 0


def mixture(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """A model of two layers whose experts are chosen by a router, 2 of 8 a token."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "vocab_size": 151, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "use_cache": False,
    }  # fmt: skip
    if name == "deepseek_v3":
        sizes |= {
            "num_key_value_heads": 4, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
            "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        }  # fmt: skip
        del sizes["head_dim"]
    config = transformers.AutoConfig.for_model(name, **sizes)
    return transformers.AutoModel.from_config(config).to(dtype).eval()


MIXTURES = (
    "qwen3_moe", "gpt_oss", "deepseek_v3", pytest.param("mixtral", marks=pytest.mark.sweep),
)  # fmt: skip
"""Mixtral's router is Qwen3's, its shares divided by their sum as DeepSeek's are."""


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_experts_are_exact(name: str) -> None:
    model = mixture(name, torch.float32)
    exact, fast = in_double(model), turbotx.optimize(model)
    # PyTorch's grouped product knows no float64: the reference takes experts one by one.
    exact.config._experts_implementation = "eager"
    for batch, seq in ((2, 9), (1, 1), (3, 17)):
        inputs = token_inputs(batch, seq)
        with torch.no_grad():
            assert_as_exact_as_eager(fast(**inputs), model(**inputs), exact(**inputs))
    assert fast.stats()["captures"] == 1
    ops = {x.op for x in turbotx.explain(model, **token_inputs(2, 5)).externs}
    assert not ops & {"aten.sort.default", "aten.histc.default", "aten.index_put.default"}
    assert not any("grouped_mm" in op for op in ops)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_of_sixteen_bits_are_exact(name: str, dtype: torch.dtype) -> None:
    experts = mixture(name, dtype).layers[1].mlp.experts
    exact, fast = in_double(experts), turbotx.optimize(experts)
    exact.config._experts_implementation = "eager"
    for rows in (1, 12, 40):
        x = torch.randn(rows, 64).to(dtype)
        weights, chosen = torch.rand(rows, 8).topk(2)
        with torch.no_grad():
            given = (chosen, weights.to(dtype))
            ours, eager = fast(x, *given), experts(x, *given)
            assert_as_exact_as_eager(ours, eager, exact(x.double(), chosen, given[1].double()))
