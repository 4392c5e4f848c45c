"""A Python float among the arguments is an input of one program, unless the model looks at it.

In: functions of a tensor and a number, called with many numbers. Out: eager's values and dtypes,
from one capture, or from one a number where the code depends on it.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import turbotx
from turbotx.engine.dynamo import compile_graph
from turbotx.errors import InputError, TurbotxError


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def scaled(x, a, b=2.0):
    return (x * a + b / a - x.long() * b) / (abs(a) + 1.0) + (-b) * 3


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]
)
def test_a_float_is_an_input(dtype) -> None:
    fast = turbotx.optimize(scaled)
    for k in range(20):
        x, a, b = (torch.randn(2, 3 + k) * 4).to(dtype), 0.37 * (k + 1), -1.3 * k
        got, wanted = fast(x, a, b=b), scaled(x, a, b=b)
        assert got.dtype is wanted.dtype
        rounded = dtype in (torch.bfloat16, torch.float16)  # between ops, by eager
        limits = {"rtol": 2e-2, "atol": 5e-2} if rounded else {}
        torch.testing.assert_close(got, wanted, **limits)
    assert fast.stats()["captures"] == 1


PROGRAMS = {
    "compare": lambda x, a: (x > a) & (a <= x + 1) | (x == a),
    "where": lambda x, a: torch.where(x > 0, x, a),
    "fill": lambda x, a: x.masked_fill(x > 0, a),
    "in place": lambda x, a: (x + 1).mul_(a).sub_(a),
    "a scalar tensor": lambda x, a: x.sum() * a,
    "whole numbers": lambda x, a: (x > 0).sum(-1) * a,
    "chain": lambda x, a: torch.softmax(x / a, -1),
    "isinstance": lambda x, a: x * a if isinstance(a, float) else x,
    "nan": lambda x, a: torch.where(x > a, x, a) + a,
}
READERS = {
    "branch": lambda x, a: x * a if a > 0.5 else x - a,
    "math": lambda x, a: x * math.sqrt(abs(a)),
    "epsilon": lambda x, a: F.layer_norm(x, (4,), eps=abs(a)),
    "power": lambda x, a: x.abs() ** a,
    "slope": lambda x, a: F.leaky_relu(x, a),
    "text": lambda x, a: x + len(f"{a:.2f}"),
    "clamp": lambda x, a: x.clamp(min=a),
    "size": lambda x, a: x[: int(abs(a) * 2) + 1],
    "a key": lambda x, a: x * {0.5: 1.0}.get(a, 3.0),
    "returned": lambda x, a: (x, a),
    "full": lambda x, a: x + torch.full((4,), a),
    "tensor": lambda x, a: x + torch.tensor(a),
}
VALUES = (0.5, 0.75, -0.25, 0.5)


@pytest.mark.parametrize("name", PROGRAMS)
def test_ops_of_a_float_are_one_program(name) -> None:
    function, fast = PROGRAMS[name], turbotx.optimize(PROGRAMS[name])
    for value in (*VALUES, math.inf, math.nan, 0.1):
        x = torch.randn(3, 4)
        torch.testing.assert_close(fast(x, value), function(x, value), equal_nan=True)
    assert fast.stats()["captures"] == 1


@pytest.mark.parametrize("name", READERS)
def test_a_float_that_is_looked_at_is_captured_by_value(name) -> None:
    function, fast = READERS[name], turbotx.optimize(READERS[name], backend="aten")
    for value in (*VALUES, *VALUES):
        x = torch.randn(3, 4)
        torch.testing.assert_close(fast(x, value), function(x, value))
    assert fast.stats()["captures"] == 3


def test_division_by_zero_is_pythons() -> None:
    fast, x = turbotx.optimize(lambda x, a: x * (1.0 / a)), torch.ones(2)
    assert torch.equal(fast(x, 4.0), x / 4)
    with pytest.raises(TurbotxError, match="ZeroDivisionError"):
        fast(x, 0.0)


def test_signed_zeros() -> None:
    fast, x = turbotx.optimize(lambda x, a: 1 / (x * a)), torch.ones(2)
    for a in (0.0, -0.0, 0.0):
        assert torch.equal(fast(x, a), 1 / (x * a))
    fast = turbotx.optimize(lambda x, a: x + math.copysign(1.0, a))
    for a in (0.0, -0.0, 0.0):
        assert torch.equal(fast(x, a), x + math.copysign(1.0, a))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x, scale):
        return self.up(x) * scale + (scale if scale > 10 else 0.0)


def test_floats_under_torch_compile() -> None:
    torch._dynamo.config.specialize_float = False
    try:
        model = Scaled().eval()
        fast = torch.compile(model, backend=compile_graph, dynamic=True)
        for k in range(8):
            x, scale = torch.randn(2 + k, 4), 0.3 * k + 0.1
            torch.testing.assert_close(fast(x, scale), model(x, scale))
        torch.testing.assert_close(fast(x, 20.5), model(x, 20.5))
        torch.testing.assert_close(fast(x, 0.7), model(x, 0.7))
    finally:
        torch._dynamo.config.specialize_float = True


def test_floats_of_saved_models(tmp_path) -> None:
    x = torch.randn(3, 4)
    fast = turbotx.optimize(lambda x, a: x * a)
    fast(x, 2.0)
    turbotx.save(fast, tmp_path / "scaled.ttx")
    loaded = turbotx.load(tmp_path / "scaled.ttx")
    for a in (2.0, -0.5, 7.0):
        torch.testing.assert_close(loaded(x, a), x * a)
    fast = turbotx.optimize(READERS["branch"])
    fast(x, 0.75)
    turbotx.save(fast, tmp_path / "branch.ttx")
    loaded = turbotx.load(tmp_path / "branch.ttx")
    torch.testing.assert_close(loaded(x, 0.75), x * 0.75)
    with pytest.raises(InputError, match=r"0\.75"):
        loaded(x, 0.25)
