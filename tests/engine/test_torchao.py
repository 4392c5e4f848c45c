"""Models that torchao has quantised: its integers by turbotx's products, also from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import turbotx
from tests.kernels.cpp.cpp_probe import needs_compiler
from tests.torchao_weights import INT4_WAYS, WAYS, quantize, quantize_int4
from turbotx.errors import SaveError

pytestmark = needs_compiler
X = torch.randn(3, 5, 16)


class Gated(nn.Module):
    """A norm, two products of one input, and one that the call returns."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.c = nn.LayerNorm(16), nn.Linear(32, 16)
        self.a, self.b = nn.Linear(16, 32), nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x.to(self.norm.weight.dtype))
        return self.c(torch.tanh(self.a(x)) * self.b(x))


def made(way: str, float_rows: bool, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return quantize(way, Gated().eval().to(dtype), float_rows)


def launches(fast: Any) -> list[str]:
    return [x.name for x in turbotx.explain(fast, X).compiled.assembly.launches]


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("float_rows", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_integers_are_multiplied_by(way: str, float_rows: bool, dtype: torch.dtype) -> None:
    model = made(way, float_rows, dtype)
    fast: Any = turbotx.optimize(model)
    ours, eager = fast(X), model(X)
    name = "linear_int8_weights" if float_rows else "linear_int8"
    assert [x for x in launches(fast) if x.startswith("linear")] == [
        f"{name}_tanh_mul_0",
        f"{name}_0",
    ]
    if float_rows:  # what it means is not in question: weights dequantised
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours, eager, rtol=8 * eps, atol=8 * eps)
    assert torch.cosine_similarity(ours.float(), eager.float(), -1).min() > 0.999
    numerics = turbotx.explain(fast, X).numerics(fast, X)
    assert numerics.holds and numerics.likenesses[0].worst > 0.999


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_changes_are_seen_and_files_hold_the_integers(way: str, tmp_path: Path) -> None:
    model = made(way, float_rows=True)
    fast: Any = turbotx.optimize(model)
    before = fast(X)
    turbotx.save(fast, tmp_path / "model.ttx")
    assert torch.equal(turbotx.load(tmp_path / "model.ttx")(X), before)
    with pytest.raises(SaveError, match="leave out panels"):
        turbotx.save(fast, tmp_path / "other.ttx", panels=[])
    model.a.weight.scale.mul_(2)
    changed = fast(X)
    assert not torch.equal(changed, before)
    torch.testing.assert_close(changed, model(X))
    model.a.weight = made(way, float_rows=True).a.weight
    assert torch.equal(fast(X), before) and fast.stats()["captures"] == 1


@torch.no_grad()
def test_beside_floats_that_are_quantised_on_request() -> None:
    model = made("stand-in", float_rows=True)
    model.b = nn.Linear(16, 32)
    names = {x for x in launches(turbotx.optimize(model)) if x.startswith("linear")}
    assert names == {"linear_0", "linear_int8_weights_0", "linear_int8_weights_1"}
    fast: Any = turbotx.optimize(model, quantize="int8")
    assert sum(x.startswith("linear_int8_weights") for x in launches(fast)) == 2
    assert sum(x.startswith("linear_int8_") for x in launches(fast)) == 3
    assert torch.cosine_similarity(fast(X), model(X), -1).min() > 0.999


class Wide(Gated):
    """The same of widths that torchao's int4 takes."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.norm, self.c = nn.LayerNorm(64), nn.Linear(96, 64)
        self.a, self.b = nn.Linear(64, 96), nn.Linear(64, 96)


WIDE = torch.randn(3, 5, 64)


@torch.no_grad()
@pytest.mark.parametrize("way", INT4_WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_int4_numbers_are_multiplied_by(way: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = quantize_int4(way, Wide().eval().to(dtype))
    fast: Any = turbotx.optimize(model)
    ours, eager = fast(WIDE), model(WIDE)
    names = [x.name for x in turbotx.explain(fast, WIDE).compiled.assembly.launches]
    assert [x for x in names if x.startswith("linear")] == [
        "linear_int4_weights_tanh_mul_0",
        "linear_int4_weights_0",
    ]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, eager, rtol=16 * eps, atol=16 * eps)
    numerics = turbotx.explain(fast, WIDE).numerics(fast, WIDE)
    assert numerics.holds and numerics.likenesses[0].worst > 0.999
    turbotx.save(fast, tmp_path / "model.ttx")
    assert torch.equal(turbotx.load(tmp_path / "model.ttx")(WIDE), ours)


@torch.no_grad()
def test_a_weight_of_another_scheme_in_its_place_is_seen() -> None:
    torch.manual_seed(0)
    model: Any = quantize_int4("Int4Tensor", Wide().eval())
    fast: Any = turbotx.optimize(model)
    fast(WIDE)
    model.c = quantize("stand-in", nn.Linear(96, 64), float_rows=True)
    torch.testing.assert_close(fast(WIDE), model(WIDE), rtol=1e-5, atol=1e-5)
    model.c = nn.Linear(96, 64)
    torch.testing.assert_close(fast(WIDE), model(WIDE), rtol=1e-5, atol=1e-5)
    assert fast.stats()["captures"] == 3
