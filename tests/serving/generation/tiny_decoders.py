"""Small causal language models with one token a word, and services over them."""

from __future__ import annotations

import functools

import torch
import transformers

import turbotx
from tests.serving.conftest import WORDS, word_tokenizer
from tests.serving.tiny_models import randomize
from turbotx.serving.generation.model import make_generator
from turbotx.serving.generation.scheduler import GenerationLimits
from turbotx.serving.generation.service import GenerationService
from turbotx.serving.settings import Settings

CONTEXT, END = 160, 3
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
MARGIN = 1e-4
"""Where two logits are nearer than this, either token is right."""


def tokenizer():
    found = word_tokenizer().tokenizer
    from tokenizers import processors

    found.post_processor = processors.ByteLevel(trim_offsets=False)  # adds no token
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]",
        model_max_length=CONTEXT,
    )  # fmt: skip
    made.chat_template = TEMPLATE
    return made


def gpt2():
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=4, vocab_size=len(WORDS), n_positions=CONTEXT,
        bos_token_id=2, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=len(WORDS), max_position_embeddings=CONTEXT,
        bos_token_id=2, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gemma3():
    """Its layers see the latest 8 positions, all but every sixth."""
    config = transformers.Gemma3TextConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=64, vocab_size=len(WORDS), sliding_window=8,
        max_position_embeddings=CONTEXT, bos_token_id=2, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config)


def bloom():
    """A bias by distance between columns, and no argument for positions."""
    config = transformers.BloomConfig(
        n_layer=2, hidden_size=32, n_head=4, vocab_size=len(WORDS), bos_token_id=2,
        eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    return transformers.BloomForCausalLM(config)


def mpt():
    """A bias by the distance of columns, empty ones included."""
    config = transformers.MptConfig(
        n_layers=2, d_model=32, n_heads=4, vocab_size=len(WORDS), max_seq_len=CONTEXT,
        bos_token_id=2, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    return transformers.MptForCausalLM(config)


def gpt_neo():
    """Its second layer sees the latest 16 columns, which no cache is told of."""
    config = transformers.GPTNeoConfig(
        num_layers=2, attention_types=[[["global", "local"], 1]], hidden_size=32, num_heads=4,
        window_size=16, vocab_size=len(WORDS), max_position_embeddings=CONTEXT,
        bos_token_id=2, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    return transformers.GPTNeoForCausalLM(config)


def generator(make=gpt2):
    """One a family, compiled once in a test process."""
    return _generator(make)


@functools.cache
def _generator(make):
    torch.manual_seed(0)
    model = randomize(make())
    return make_generator(model, turbotx.optimize(model), tokenizer(), "tiny")


def make_service(make=gpt2, max_cache_nbytes=64 << 20, settings=None, **limits):
    defaults = {"max_sequences": 6, "prefill_tokens": 24}
    return GenerationService(
        generator(make), settings or Settings(), GenerationLimits(**{**defaults, **limits}),
        max_cache_nbytes,
    )  # fmt: skip


def is_greedy(model, prompt, tokens):
    """Whether each token is the most probable one in eager, or as good as that."""
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return bool((logits.amax(1) - chosen <= MARGIN).all())
