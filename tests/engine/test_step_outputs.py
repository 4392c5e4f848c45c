"""What steps return beside logits, and encoders that return more than hidden states."""

from __future__ import annotations

import warnings

import pytest
import torch

import turbotx
from tests.engine.decoders import LIKE_LLAMA, SIZES, VOCABULARY, WINDOW, make, prompt
from turbotx.errors import EagerWarning

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def nothing_runs_in_pytorch():
    with warnings.catch_warnings():
        warnings.simplefilter("error", EagerWarning)
        yield


def generate(model, inputs):
    return model.generate(
        **inputs, max_new_tokens=6, min_new_tokens=6, return_dict_in_generate=True,
        output_attentions=True, output_hidden_states=True, output_logits=True,
    )  # fmt: skip


def assert_same(got, want):
    assert torch.equal(got.sequences, want.sequences)
    sides = "attentions", "hidden_states"
    names = [f"{of}{what}" for of in ("", "encoder_", "decoder_") for what in sides]
    for name in ("logits", "cross_attentions", *names):
        found = [getattr(output, name, None) for output in (got, want)]
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma", "bart"])
def test_attentions_and_hidden_states_are_those_of_eager(family: str) -> None:
    """Gemma's windows leave attentions of so many keys; an encoder's are passed to every step."""
    model = make(family)
    inputs = prompt(family, 2, WINDOW + 3, padded=2)
    assert_same(generate(turbotx.optimize(model), inputs), generate(model, inputs))


def test_an_encoder_that_returns_its_own_mask() -> None:
    """Moonshine's decoder reads the mask off what the encoder returned, None without one."""
    torch.manual_seed(0)
    sizes = {k: LIKE_LLAMA[k] for k in ("hidden_size", "intermediate_size")}
    counts = {f"{part}_{what}": n for part in ("encoder", "decoder")
              for what, n in (("num_hidden_layers", 2), ("num_attention_heads", 4))}  # fmt: skip
    config = transformers.MoonshineConfig(**SIZES, **sizes, **counts, decoder_start_token_id=0)
    model = transformers.MoonshineForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 1
    fast, heard = turbotx.optimize(model), torch.randn(2, 4000)
    mask = torch.ones(2, 4000, dtype=torch.long)
    mask[0, 2500:] = 0
    for inputs in ({"input_values": heard}, {"input_values": heard, "attention_mask": mask}):
        assert_same(generate(fast, inputs), generate(model, inputs))


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
def test_steps_in_bfloat16_are_as_near_to_float64_as_eagers(family: str) -> None:
    model = make(family)
    ids = prompt(family, 3, 20)["input_ids"]

    def steps(one):
        cache = transformers.DynamicCache(config=model.config)
        parts = [ids[:, :8], *ids[:, 8:].split(1, dim=1)]
        found = [one(part, past_key_values=cache, use_cache=True).logits for part in parts]
        return torch.cat(found, 1).double()

    exact = steps(model.double())
    model.to(torch.bfloat16)
    ours, theirs = ((steps(one) - exact).abs() for one in (turbotx.optimize(model), model))
    assert ours.mean() <= 1.5 * theirs.mean() and ours.max() <= 1.5 * theirs.max()


@torch.no_grad()
def test_steps_take_no_memory_but_a_block_every_64_positions() -> None:
    fast, ids = turbotx.optimize(make("gpt2")), prompt("gpt2", 1, 100)["input_ids"]
    cache, seen = transformers.DynamicCache(), []
    for k in range(100):
        fast(ids[:, k : k + 1], past_key_values=cache, use_cache=True)
        stats = fast.stats()
        assert stats["cache_blocks"] == 2 * -(-(k + 1) // 64)
        seen.append(stats["chunk_allocations"])
    assert len(set(seen[1:])) == 1


def test_prompt_lookup_of_as_many_tokens_as_logits_are_kept() -> None:
    """Whether the rows kept are all there are decides no value, and is no guard."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
             "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
             "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
             "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "n_group": 1,
             "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "topk_group": 1,
             "max_position_embeddings": 128, "topk_method": "greedy"}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.DeepseekV2Config(**SIZES, **sizes)
    model = transformers.DeepseekV2ForCausalLM(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 1
    ids = torch.randint(2, VOCABULARY, (1, 6)).repeat(1, 3)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False}
    given |= {"max_new_tokens": 12, "prompt_lookup_num_tokens": 3}
    fast = turbotx.optimize(model)
    assert torch.equal(fast.generate(**given), model.generate(**given))
    assert fast.stats()["eager_calls"] == 0
