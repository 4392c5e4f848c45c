"""Int8 weights whose floats are given up: read dequantised, shared, the same integers ever on."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import turbotx
from tests.kernels.cpp.cpp_probe import needs_compiler
from turbotx.errors import QuantizedWarning, WeightsReleasedError
from turbotx.ir.quantized_ops import quantize_rows, row_scale
from turbotx.runtime.packed_parameter import PackedParameter
from turbotx.runtime.packed_weight import PackedWeight

pytestmark = needs_compiler
X = torch.randn(4, 8)


class Projections(nn.Module):
    """Two products of one input, which are packed as one, a turned one, one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.turned, self.twice = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, scale: Any = None, only_a: bool = False) -> torch.Tensor:
        x = x.to(self.turned.dtype)
        both = self.a(x).tanh() if only_a else self.a(x).tanh() * self.b(x).tanh()
        out = self.twice(self.twice(both @ self.turned).tanh()).tanh()
        return out if scale is None else out * scale


def make(dtype: torch.dtype = torch.float32, how: Any = "int8", **options: Any) -> tuple[Any, ...]:
    torch.manual_seed(1)
    model = Projections().eval().to(dtype)
    plain = copy.deepcopy(model)
    keeping = turbotx.optimize(plain, quantize=how)
    return model, plain, turbotx.optimize(model, quantize=how, keep_weights=False), keeping


def packed_names(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if isinstance(p, PackedParameter)}


ALL = {"turned", "twice.weight", "a.weight", "b.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["int8", "int8-weights", "int4-weights"])
def test_floats_are_given_up_and_results_stay(dtype: torch.dtype, how: str) -> None:
    model, plain, fast, keeping = make(dtype, how)
    left = weakref.ref(model.a.weight)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(fast(X), keeping(X))
        gc.collect()
        assert left() is None and packed_names(model) == ALL
        for one in (model, plain):  # scales and integers are not made again from what is left
            one.a.bias.add_(1)
        assert torch.equal(fast(X), keeping(X))
        for more in ({"scale": torch.ones(8, dtype=dtype)}, {"only_a": True}):  # arranged otherwise
            assert torch.equal(fast(X, **more), keeping(X, **more))


def test_another_kind_of_call_shares_what_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, fast, keeping = make()
    fast(X), keeping(X)
    before = keeping(X, torch.full((8,), 2.0))
    monkeypatch.setattr(PackedWeight, "of", lambda *args: pytest.fail("packed again"))
    assert torch.equal(fast(X, torch.full((8,), 2.0)), before)


def test_a_state_dict_is_dequantised_and_says_so() -> None:
    model, plain, fast, _ = make()
    fast(X)
    with pytest.warns(QuantizedWarning, match="integers times scales"):
        state = model.state_dict()
    for name, true in plain.state_dict().items():
        rows, found = (t.t() if name == "turned" else t for t in (true, state[name]))
        if name in ALL:
            scale = row_scale(rows)
            assert torch.equal(found, quantize_rows(rows, scale) * scale)
        else:
            assert torch.equal(found, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantizedWarning)
        assert plain.state_dict()
    with pytest.raises(WeightsReleasedError):
        model.a.weight.data.zero_()


def test_a_program_of_floats_is_refused_the_floats_that_are_gone() -> None:
    model, _, fast, _ = make()
    fast(X)
    with pytest.raises(WeightsReleasedError, match=r"reads '.*' as floats"):
        turbotx.optimize(model)(X)


def test_numerics_are_of_the_integers_that_are_held() -> None:
    _, _, fast, keeping = make(torch.bfloat16)
    fast(X), keeping(X)
    for one in (fast, keeping):
        assert turbotx.explain(one, X).numerics(one, X).holds


def test_a_shared_weight_is_packed_once() -> None:
    _, _, fast, _ = make()
    packings = turbotx.explain(fast, X).compiled.program.executable.cpu.packings
    assert len(packings) == 3
