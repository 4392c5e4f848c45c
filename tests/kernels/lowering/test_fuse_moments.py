"""Means and variances by hand: which kernels find both in one reduction, and which keep theirs.

In: functions of one tensor, lowered. Out: the reductions of their kernel, for example::

    x - mean, then its mean square  ->  ["welford", "sum"], none waiting for another
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.compiled_functions import by_interpreter, compile_function
from turbotx import ir
from turbotx.kernels.cpp.sweeps import Sweeps
from turbotx.kernels.lowering.fuse_moments import join_moments

Function = Callable[[torch.Tensor], torch.Tensor]


def lower(function: Function, x: torch.Tensor) -> ir.Kernel:
    """Return the one kernel of a function, whose meaning is checked on the way."""
    made = compile_function(function, x)
    (ours,) = made.run((x,), by_interpreter)
    torch.testing.assert_close(ours, function(x.double()), rtol=1e-11, atol=1e-11)
    (kernel,) = made.kernels
    return kernel


def reductions(kernel: ir.Kernel) -> list[str]:
    return [s.op for s in kernel.body if isinstance(s, ir.Reduce)]


def normalize(x: torch.Tensor) -> torch.Tensor:
    away = x - x.mean(-1, keepdim=True)
    return away / torch.sqrt(away.pow(2).mean(-1, keepdim=True) + 1e-5)


def standardize(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean((1, 2), keepdim=True)) / x.std((1, 2), keepdim=True)


def deviate(x: torch.Tensor) -> torch.Tensor:
    """A variance by hand beside torch's own: one reduction for both."""
    away = x - x.mean(-1, keepdim=True)
    return away.square().sum(-1) / (x.shape[-1] - 1) + x.var(-1)


def center(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(-1, keepdim=True)


def about_another(x: torch.Tensor) -> torch.Tensor:
    """The deviations are not from the mean of what they are deviations of."""
    return (x - (2 * x).mean(-1, keepdim=True)).square().sum(-1)


def half_mean(x: torch.Tensor) -> torch.Tensor:
    return (x - x.sum(-1, keepdim=True) / (2 * x.shape[-1])).square().sum(-1)


@pytest.mark.parametrize(
    ("function", "x", "sweeps"),
    [(normalize, torch.randn(3, 5), 2), (normalize, torch.randn(3, 1), 2),
     (standardize, torch.randn(3, 5, 7), 2), (deviate, torch.randn(3, 5), 1)],
)  # fmt: skip
def test_joins(function: Function, x: torch.Tensor, sweeps: int) -> None:
    kernel = lower(function, x)
    assert reductions(kernel).count("welford") == 1
    assert Sweeps(kernel).count == sweeps


def test_a_known_width_is_a_count_too() -> None:
    b = torch.ones(6)
    kernel = lower(lambda x: normalize(x + b), torch.randn(3, 6))
    assert reductions(kernel).count("welford") == 1
    assert Sweeps(kernel).count == 2


@pytest.mark.parametrize("function", [center, about_another, half_mean])
def test_keeps(function: Function) -> None:
    kernel = lower(function, torch.randn(3, 5))
    assert set(reductions(kernel)) == {"sum"}
    assert join_moments(kernel) is kernel


def test_a_mean_with_infinities_stays_what_it_is() -> None:
    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.mean(-1), x.var(-1)

    x = torch.tensor([[1.0, -torch.inf], [torch.inf, -torch.inf], [1.0, 2.0]])
    outputs = compile_function(both, torch.randn(3, 5)).run((x,), by_interpreter)
    for ours, true in zip(outputs, both(x.double()), strict=True):
        assert torch.equal(ours.isnan(), true.isnan())
        assert torch.equal(ours.nan_to_num(7.0), true.nan_to_num(7.0))
