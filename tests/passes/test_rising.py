"""Masks that look for packed sequences: left out where places rise by one, and only there."""

from __future__ import annotations

import pytest
import torch

import turbotx
from turbotx.engine.optimize import engine_of


def packed_mask(places: torch.Tensor) -> torch.Tensor:
    """Causal, and within a sequence, as transformers' decoders have it: (1, 1, seq, seq)."""
    begins = torch.diff(places, prepend=places[:, :1] - 1, dim=-1) != 1
    sequence = begins.cumsum(-1)
    n, batch = torch.arange(places.shape[1]), torch.arange(1)[:, None, None, None]
    rows, columns = n[None, None, :, None], n[None, None, None, :]
    return (sequence[batch, rows] == sequence[batch, columns]) & (columns <= rows)


PLACES = {
    "arange": lambda n: torch.arange(n)[None],
    "later": lambda n: torch.arange(n).unsqueeze(0) + 3,
    "of a batch": lambda n: torch.arange(n)[None].expand(2, -1)[:, :],
}
OTHERS = {
    "by two": lambda n: torch.arange(0, 2 * n, 2)[None],
    "halves": lambda n: (torch.arange(n) % (n // 2))[None],
    "back": lambda n: (n - torch.arange(n))[None],
    "equal": lambda n: torch.arange(1)[None].expand(1, n),
}


def attend(make):
    def function(x: torch.Tensor) -> torch.Tensor:
        mask = packed_mask(make(x.shape[1]))
        return torch.nn.functional.scaled_dot_product_attention(
            *(x[:, None] + k for k in range(3)), mask
        )[:, 0] + x  # fmt: skip

    return function


@pytest.mark.parametrize("name", [*PLACES, *OTHERS])
def test_only_places_that_rise_by_one_need_no_mask(name: str) -> None:
    function = attend({**PLACES, **OTHERS}[name])
    fast = turbotx.optimize(function)
    for n in (6, 10, 64):
        x = torch.randn(1, n, 8)
        torch.testing.assert_close(fast(x), function(x), rtol=1e-4, atol=1e-5)
    graph = engine_of(fast).variants()[0].graph
    compared = graph.find_nodes(op="call_function", target=torch.ops.aten.eq.Tensor)
    assert bool(compared) == (name in OTHERS)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decoders_called_without_a_mask_hold_no_square(family: str, batch: int) -> None:
    from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

    if family == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=50, use_cache=False)
        model = LlamaModel(config).eval()
    else:
        names = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
        model = GPT2Model(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=50, **names)).eval()
    fast, ids = turbotx.optimize(model), torch.randint(0, 50, (batch, 9))
    ours, theirs = fast(input_ids=ids), model(input_ids=ids)
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state)
    program = engine_of(fast).variants()[0].program
    few, more = (
        program.sizes_at([n if dim == "seq" else batch for dim in program.dims]) for n in (256, 512)
    )
    assert all(more[name] <= 2 * few[name] for name in few)
