"""Quantized pairs: which of PyTorch's quantiser become products of int8, and which PyTorch runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed
from torch import nn

import turbotx
from tests.kernels.cpp.cpp_probe import needs_compiler
from turbotx.engine.optimize import engine_of
from turbotx.engine.pipeline import assemble_call
from turbotx.errors import InputError

pytestmark = needs_compiler
ops: Any = torch.ops.quantized_decomposed


class Pairs(nn.Module):
    """A norm and two layers as PT2E leaves them; `how` says what its pairs are like."""

    def __init__(
        self, width: int = 16, inner: int = 33, dynamic: bool = False, signed: bool = False,
        bias: bool = True, **how: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.dynamic, self.how = nn.LayerNorm(width), dynamic, how
        self.range = (-128, 127, torch.int8) if signed else (0, 255, torch.uint8)
        self.zero = how.get("zero", -3 if signed else 117)
        for name, (n, k) in {"up": (inner, width), "down": (width, inner)}.items():
            self.register_buffer(name, torch.randint(-128, 128, (n, k), dtype=torch.int8))
            self.register_buffer(f"{name}_scale", torch.rand(n) / 300 + 1e-3)
            self.register_buffer(f"{name}_zero", torch.zeros(n, dtype=torch.int64))
            self.register_buffer(f"{name}_bias", torch.randn(n) if bias else None)

    def product(self, x: torch.Tensor, name: str) -> torch.Tensor:
        low, high, dtype = self.range
        if self.dynamic:
            step, zero = ops.choose_qparams.tensor(x, low, high, 2.0**-12, dtype)
            args = (step, zero, low, high, dtype)
            x = ops.quantize_per_tensor.tensor(x, *args)
            x = ops.dequantize_per_tensor.tensor(x, *args)
        else:
            step = self.how.get("step", 0.02)
            x = ops.quantize_per_tensor.default(x, step, self.zero, low, high, dtype)
            other = self.how.get("other", self.zero)
            x = ops.dequantize_per_tensor.default(x, step, other, low, high, dtype)
        of = [getattr(self, name + end) for end in ("", "_scale", "_zero", "_bias")]
        weight = ops.dequantize_per_channel.default(*of[:3], 0, -128, 127, torch.int8)
        return nn.functional.linear(x, weight, of[3])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(torch.tanh(self.product(self.norm(x), "up")), "down") + x


def names(fast: Any, x: torch.Tensor) -> list[str]:
    return [launch.name for launch in turbotx.explain(fast, x).compiled.assembly.launches]


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_pairs_become_products_of_int8(dynamic: bool, signed: bool, bias: bool) -> None:
    model = Pairs(dynamic=dynamic, signed=signed, bias=bias).eval()
    fast: Any = turbotx.optimize(model)
    for shape in ((3, 5, 16), (1, 1, 16), (2, 40, 16)):
        x = torch.randn(shape)
        # A row that lies between two integers may round to the other one: a step of it.
        torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=2e-2)
        assert ((fast(x) - model(x)).abs() < 1e-5).float().mean() > 0.9
    made = names(fast, x)
    assert [n for n in made if n.startswith("linear")] == (
        ["linear_int8_0", "linear_int8_1" if dynamic else "linear_int8_add_0"]
    )
    assert len(made) <= (9 if dynamic else 5)
    assert not any("quantize_per" in n for n in made)
    numerics = turbotx.explain(fast, x).numerics(fast, x)
    assert numerics.holds and numerics.likenesses[0].worst > 0.99


@torch.no_grad()
def test_no_rows_and_odd_widths() -> None:
    for width, inner in ((1, 1), (7, 3), (64, 130)):
        model = Pairs(width, inner).eval()
        fast: Any = turbotx.optimize(model)
        for rows in (0, 1, 13):
            x = torch.randn(2, rows, width)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=2e-2)


@torch.no_grad()
@pytest.mark.parametrize("other", ["zero points of the weight", "unequal pairs"])
def test_what_is_not_understood_runs_through_pytorch_and_is_listed(other: str) -> None:
    model = Pairs(other=100) if other == "unequal pairs" else Pairs()
    if other != "unequal pairs":
        model.up_zero += 1
        model.down_zero[3] = -2
    fast: Any = turbotx.optimize(model.eval())
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=2e-2)
    report = turbotx.explain(fast, x)
    listed = {e.op for e in report.externs}
    assert {f"quantized_decomposed.{n}_per_tensor.default" for n in ("quantize", "dequantize")} <= (
        listed
    )
    assert report.numerics(fast, x).holds


@torch.no_grad()
def test_zero_points_that_change_are_seen() -> None:
    model = Pairs().eval()
    fast: Any = turbotx.optimize(model)
    x = torch.randn(2, 3, 16)
    fast(x)
    model.up_scale.mul_(2)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=2e-2)
    assert fast.stats()["captures"] == 1
    model.up_zero[2] = 100
    torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=2e-2)
    assert [n for n in names(fast, x) if "linear" in n] == ["linear_0", "linear_int8_add_0"]


def test_on_a_gpu_pytorch_runs_the_pairs() -> None:
    engine = engine_of(turbotx.optimize(Pairs().eval()))
    captured = engine.capture((torch.randn(2, 3, 16),), {})
    call = assemble_call(captured, engine.options, "sm_90")
    assert any("quantize_per_tensor" in x.name for x in call.programs[0].assembly.launches)
    with pytest.raises(InputError, match="was compiled with int8_pairs=False"):
        assemble_call(captured, engine.options, "cpu")


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
def test_models_of_torchaos_quantiser(dynamic: bool) -> None:
    pt2e = pytest.importorskip("torchao.quantization.pt2e")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.LayerNorm(16), nn.Linear(16, 33), nn.GELU(), nn.Linear(33, 16), nn.LayerNorm(16)
    ).eval()
    x = torch.randn(4, 5, 16)
    sizes = ({0: torch.export.Dim("batch", max=64)},)
    exported = torch.export.export(plain, (x,), dynamic_shapes=sizes).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic))
    prepared = prepare_pt2e(exported, quantizer)
    prepared(x)
    model = convert_pt2e(prepared)
    pt2e.move_exported_model_to_eval(model)
    fast: Any = turbotx.optimize(model)
    torch.testing.assert_close(fast(x[:3]), model(x[:3]), rtol=1e-3, atol=2e-2)
    assert torch.cosine_similarity(fast(x), plain(x), -1).min() > 0.99
    assert sum(n.startswith("linear_int8") for n in names(fast, x)) == 2
