"""Whole models as programs for a GPU, every kernel in Triton's interpreter, against eager.

In: BERT, GPT-2 and Llama, tiny, with padded rows; two shapes, run plainly, captured and replayed.
Out: errors against float64 by the rule of every other test, and no kernel built twice.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.models import assert_as_exact_as_eager, in_double, token_inputs
from tests.runtime.stand_in_device import InterpretedDevice, bind_to
from tests.test_attention import every_mask, operands

transformers = pytest.importorskip("transformers")


def tiny(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "bert":
        config = transformers.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            vocab_size=160, max_position_embeddings=32,
        )  # fmt: skip
        return transformers.BertModel(config).to(dtype).eval()
    if name == "gpt2":
        config = transformers.GPT2Config(
            n_embd=16, n_layer=1, n_head=2, n_inner=32, vocab_size=160, n_positions=32,
            bos_token_id=1, eos_token_id=2, use_cache=False,
        )  # fmt: skip
        return transformers.GPT2Model(config).to(dtype).eval()
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, vocab_size=160, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaModel(config).to(dtype).eval()


def check(fast: Any, model: torch.nn.Module, batch: int, seq: int) -> None:
    inputs = token_inputs(batch, seq)
    with torch.no_grad():
        eager, exact = model(**inputs), in_double(model)(**copy.deepcopy(inputs))
    assert_as_exact_as_eager(fast(**inputs), eager, exact)


@pytest.mark.parametrize("way", ["flash", "fused-softmax"])
def test_every_mask_of_attention(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def masks(*given: torch.Tensor) -> list[torch.Tensor]:
        # Three kernels an attention take the interpreter long: a mask, a bias, -inf by hand.
        return every_mask(*given)[2::3] if way == "fused-softmax" else every_mask(*given)

    fast = bind_to(InterpretedDevice(), masks, monkeypatch, attention=way)
    given = operands(3, 5, 20, torch.float32)
    exact = masks(*(t.double() if t.is_floating_point() else t for t in given))
    for ours, eager, true in zip(fast(*given), masks(*given), exact, strict=True):
        assert torch.equal(ours.isnan(), true.isnan())
        assert_as_exact_as_eager(ours.nan_to_num(), eager.nan_to_num(), true.nan_to_num())


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_model_runs_as_a_gpu_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name, torch.float16 if name == "gpt2" else torch.float32)
    device = InterpretedDevice()
    fast = bind_to(device, model, monkeypatch)
    check(fast, model, 2, 3)
    built = fast.stats()["kernel_builds"]
    for batch, seq in ((1, 1), (2, 3)):  # plainly again, then captured and replayed
        check(fast, model, batch, seq)
    assert fast.stats()["captures"] == fast.stats()["graph_captures"] == 1
    assert fast.stats()["kernel_builds"] == built
    assert [graph.replays for graph in device.graphs] == [1]
