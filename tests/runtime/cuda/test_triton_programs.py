"""Whole models as programs for a GPU, every kernel in Triton's interpreter, against eager.

In: BERT, GPT-2 and Llama, tiny, with padded rows; two shapes, run plainly, captured and replayed;
GEMMs as templates, with split sums, or PyTorch's with a kernel behind them.
Out: errors against float64 by the rule of every other test, and no kernel built twice.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.engine.test_attention import every_mask, operands
from tests.models import assert_as_exact_as_eager, in_double, token_inputs
from tests.ops.operator_samples import excess
from tests.passes.test_experts import Experts
from tests.runtime.cuda.stand_in_device import InterpretedDevice, bind_to
from turbotx.errors import IndexOutOfRangeError

transformers = pytest.importorskip("transformers")


def tiny(
    name: str, dtype: torch.dtype = torch.float32, max_position_embeddings: int = 32
) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "bert":
        config = transformers.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            vocab_size=160, max_position_embeddings=max_position_embeddings,
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


# In how many parts k is summed, where a template runs; "cublas": PyTorch's GEMM everywhere.
WAYS = {
    "templates": {"gemms": "triton"},
    "split": {"gemms": "triton", "schedules": {"gemm_*": "m16n16k16x2"}},
    "library": {"schedules": {"gemm_*": "cublas"}},
}


class Epilogues(torch.nn.Module):
    """Every kind of epilogue: in place over the sums or not, by the library itself, none."""

    def __init__(self) -> None:
        super().__init__()
        linear = torch.nn.Linear
        self.up, self.down, self.gate = linear(16, 40), linear(40, 16), linear(16, 80, bias=False)
        self.relu, self.last = linear(40, 30), linear(30, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x + self.down(F.gelu(self.up(x)))
        first, second = self.gate(h).chunk(2, -1)
        return self.last(F.relu(self.relu(F.silu(first) * second)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_epilogue_each_way(
    way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, device = Epilogues().to(dtype).eval(), InterpretedDevice()
    fast = bind_to(device, model, monkeypatch, **WAYS[way])
    for shape in ((2, 9, 16), (1, 1, 16), (2, 9, 16), (2, 0, 16)):
        x = torch.randn(*shape).to(dtype)
        with torch.no_grad():
            assert_as_exact_as_eager(fast(x), model(x), in_double(model)(x.double()))
    names = [n.removeprefix("gemm_") for n in device.names("launch")]
    assert any(n.endswith("_silu_gated") for n in names) == (way != "library")
    splits = {e[2][1] for e in device.log if e[0] == "launch" and e[1].startswith("gemm_")}
    assert splits == {"templates": {1}, "split": {2}, "library": set()}[way]
    assert ("_addmm_activation" in device.names("call")) == (way == "library")


@pytest.mark.parametrize(
    ("name", "way"), [("bert", "templates"), ("gpt2", "split"), ("llama", "library")]
)
def test_a_model_runs_as_a_gpu_program(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name, torch.float16 if name == "gpt2" else torch.float32)
    device = InterpretedDevice()
    fast = bind_to(device, model, monkeypatch, **WAYS[way])
    check(fast, model, 2, 3)
    called = [n for n in device.names("call") if n in ("mm", "addmm")]
    assert bool(called) == (way == "library")
    assert any(n.startswith("gemm_") for n in device.names("launch")) == (way != "library")
    built = fast.stats()["kernel_builds"]
    for batch, seq in ((1, 1), (2, 3)):  # plainly again, then captured and replayed
        check(fast, model, batch, seq)
    assert fast.stats()["captures"] == fast.stats()["graph_captures"] == 1
    assert fast.stats()["kernel_builds"] == built
    assert [graph.replays for graph in device.graphs] == [1]


class EveryKind(torch.nn.Module):
    """Floats, whole numbers and truth values through checked lookups, sums, norms and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = torch.nn.Embedding(50, 16), torch.nn.Embedding(40, 16)
        self.norm, self.qkv = torch.nn.LayerNorm(16), torch.nn.Linear(16, 48)

    def forward(
        self, x: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, small: torch.Tensor
    ) -> list[torch.Tensor]:
        place = (mask.long().cumsum(-1) - 1).clamp(min=0)
        h = self.norm(self.words(ids) + self.places(place) + x)
        q, k, v = self.qkv(h).chunk(3, -1)
        scores = (q @ k.mT * 0.25).masked_fill(~mask[:, None], -torch.inf)
        whole = (small.to(torch.int32) * 3 - 7) // 2 % 5
        bits = (small & 7) ^ (small >> 1)
        return [
            h + scores.softmax(-1).nan_to_num(0.0) @ v, x.amax(-1).logsumexp(-1), x.isnan().sum(-1),
            whole.sum(-1), bits.amax(-1), (mask & (small > 3)).any(-1), mask.all(-1),
            small.float().argmax(-1), torch.where(mask, ids, -1).amax(-1),
        ]  # fmt: skip


def test_hostile_values_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = EveryKind().half().eval()
    wide, fast = in_double(model), bind_to(InterpretedDevice(), model, monkeypatch)
    values = {"plain": 1.0, "denormal": 1e-7, "infinite": torch.inf, "none": torch.nan,
              "hidden": 1.0}  # fmt: skip
    for kind, value in values.items():
        x = torch.randn(2, 5, 16).half()
        x = x * value if kind == "denormal" else x
        x[0, 0, 3] *= value
        ids, small = torch.randint(0, 50, (2, 5)), torch.randint(0, 100, (2, 5)).byte()
        mask = torch.rand(2, 5) > 0.3
        mask[0] &= kind != "hidden"
        with torch.no_grad():
            eager, exact = model(x, ids, mask, small), wide(x.double(), ids, mask, small)
        for k, (ours, own, true) in enumerate(
            zip(fast(x, ids, mask, small), eager, exact, strict=True)
        ):
            assert excess(ours, own, true) is None, f"{kind}, {k}: {excess(ours, own, true)}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_are_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    device = InterpretedDevice()
    module = Experts(3, dtype=dtype).eval()
    fast = bind_to(device, module, monkeypatch)
    for rows in (5, 1, 40, 5, 5):
        x = torch.randn(rows, 24, dtype=dtype)
        with torch.no_grad():
            (ours, _), (eager, _), (exact, _) = fast(x), module(x), module.in_double(x)
        assert_as_exact_as_eager(ours, eager, exact)
    assert not [call for call in device.names("call") if "grouped" in call or "route" in call]
    launched = set(device.names("launch"))
    assert "route" in launched
    assert sum(n.startswith("grouped_gemm") for n in launched) == 2


def test_wrong_ends_of_experts_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(2, 16, 16)

    def product(x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(x, weight.mT, offs=ends)

    fast, x = bind_to(InterpretedDevice(), product, monkeypatch), torch.randn(7, 16)
    right = torch.tensor([2, 7], dtype=torch.int32)
    torch.testing.assert_close(fast(x, right), product(x, right))
    with pytest.raises(IndexOutOfRangeError, match="none below the one before"):
        [fast(x, torch.tensor(ends, dtype=torch.int32)) for ends in ([3, 2], [2, 7])]
