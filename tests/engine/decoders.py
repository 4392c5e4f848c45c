"""Decoders: tiny models of ten families with random weights, and what to call them with.

In: a family's name. Out: a model in evaluation mode that never stops early, and inputs::

    make("llama"), prompt("llama", batch=3, length=8, padded=2)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from turbotx.errors import EagerWarning

VOCABULARY = 96
SIZES = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1}
LIKE_LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
LIKE_BART = {
    "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
}  # fmt: skip
WINDOW = 8

# family: (class, config's class, what it takes besides SIZES)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config",
             {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "opt": ("OPTForCausalLM", "OPTConfig",
            {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "max_position_embeddings": 128, "word_embed_proj_dim": 32}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LIKE_LLAMA),
    "qwen": ("Qwen3ForCausalLM", "Qwen3Config", {**LIKE_LLAMA, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**LIKE_LLAMA, "sliding_window": WINDOW}),
    "gemma": ("Gemma3ForCausalLM", "Gemma3TextConfig",
              {**LIKE_LLAMA, "head_dim": 8, "sliding_window": WINDOW,
               "layer_types": ["sliding_attention", "full_attention"]}),
    "t5": ("T5ForConditionalGeneration", "T5Config",
           {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2,
            "num_heads": 4, "decoder_start_token_id": 0}),
    "bart": ("BartForConditionalGeneration", "BartConfig",
             {**LIKE_BART, "max_position_embeddings": 128, "forced_eos_token_id": None,
              "decoder_start_token_id": 0}),
    "marian": ("MarianMTModel", "MarianConfig",
               {**LIKE_BART, "max_position_embeddings": 128, "forced_eos_token_id": None,
                "decoder_start_token_id": 1}),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig",
                {**LIKE_BART, "num_mel_bins": 8, "max_source_positions": 20,
                 "max_target_positions": 64, "decoder_start_token_id": 0, "suppress_tokens": None,
                 "begin_suppress_tokens": None}),
}  # fmt: skip
POSITIONS = {"n_positions", "max_position_embeddings", "max_target_positions"}
WITH_ENCODER = ("t5", "bart", "marian", "whisper")


def make(family: str, positions: int | None = None, seed: int = 0) -> Any:
    """Return a family's model; positions: how many it has, instead of its usual ones."""
    import transformers

    torch.manual_seed(seed)
    model, config, sizes = FAMILIES[family]
    if positions is not None:
        sizes = sizes | dict.fromkeys(POSITIONS & sizes.keys(), positions)
    made = getattr(transformers, model)(getattr(transformers, config)(**SIZES, **sizes))
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = None, 1
    return made.eval()


def prompt(family: str, batch: int, length: int, padded: int = 0) -> dict[str, torch.Tensor]:
    """Return what `generate` takes; the first row begins with `padded` tokens of padding."""
    generator = torch.Generator().manual_seed(batch + length)
    if family == "whisper":
        return {"input_features": torch.randn(batch, 8, 40, generator=generator)}
    ids = torch.randint(2, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :padded], mask[0, :padded] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, inputs: dict[str, torch.Tensor], count: int = 12, **way: Any) -> Any:
    """Return as many new tokens, drawn from the same seed each time."""
    torch.manual_seed(7)
    return model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, **way)


@pytest.fixture(autouse=True)
def nothing_runs_in_pytorch() -> Iterator[None]:
    """Make every call that runs in PyTorch an error, in the modules that import this."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", EagerWarning)
        yield
