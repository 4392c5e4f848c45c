"""A value that is computed more than once, or beside what was made of it, is one number.

In: functions that compare a value with its own maximum, or take its root's argument from both. Out:
the maximum is found among the values, and no difference is negative, whichever loops and kernels
compute them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import turbotx
from tests.kernels.cpp.cpp_probe import needs_compiler

HALVES = (torch.bfloat16, torch.float16)


def in_one_loop(x, y, z):
    v = x * 1.1 + 1
    m = v.amax(-1, keepdim=True)
    return (v == m).any(-1), (m - v).sqrt(), x * 1.1


def in_two_kernels(x, y, z):
    v = x * y + z
    m, n = v.amax(-1, keepdim=True), v.amin(0, keepdim=True)
    return (v == m).any(-1), (v == n).any(0), (m - v).sqrt(), (v - n).sqrt(), v.sum(0)


def beside_a_stored_part(x, y, z):
    p = x * y
    v = p - z
    m = v.amax(-1, keepdim=True)
    return (v == m).any(-1), (m - v).sqrt().sum(0), p.sum(0), p.sin()


def after_a_function(x, y, z):
    v = x.exp() + y
    m = v.amax((0, 1), keepdim=True)
    return (v == m).any(), (m - v).sqrt(), x.exp().sum(0), (v >= m).any()


def in_part_of_a_whole(x, y, z):
    v = (x * y).cosh()
    part = v[:1]
    part -= part.amax(-1, keepdim=True)
    return (v[:1] == 0).any(-1), v + z


FUNCTIONS = (
    in_one_loop,
    in_two_kernels,
    beside_a_stored_part,
    after_a_function,
    in_part_of_a_whole,
)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_value_and_its_own_extremes(function: Callable, dtype: torch.dtype) -> None:
    fast = turbotx.optimize(function)
    for rows in (37, 3):
        found, *rest = fast(*(torch.randn(rows, 67, dtype=dtype) for _ in range(3)))
        assert found.all()
        assert not any(r.isnan().any() for r in rest if r.is_floating_point())


@needs_compiler
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_conversions_round(half: torch.dtype) -> None:
    """What was asked to be in a half type has only that type's digits, though nothing stores it."""

    def function(x):
        y = x.to(half).float()
        return (
            x - y,
            y == x,
            (x * 1e30).to(half).to(x.dtype),
            x.to(half).double(),
            x.long().to(half),
            (x.to(half) * 1.1).float(),
            (x.to(half) * 1.1) + x,
        )

    fast, x = turbotx.optimize(function), torch.randn(5, 33) * 300
    for came, right in zip(fast(x), function(x), strict=True):
        assert torch.equal(came, right)


@needs_compiler
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_decisions_are_made_by_what_a_dtype_holds(half: torch.dtype) -> None:
    def function(x):
        y = x * 1.01
        return (
            y == y.to(torch.float32), y.floor(), y.round(), y // 3, y % 3, y.long(), y.sign(),
            y.argmax(-1), (y * y).isinf(), y > 2.02, (y * 1e-9).bool(), (y * 1e-30).any(-1),
        )  # fmt: skip

    x = (torch.arange(4 * 65).reshape(4, 65) * 1.7 - 100).to(half)
    for came, right in zip(turbotx.optimize(function)(x), function(x), strict=True):
        assert torch.equal(came, right)


@needs_compiler
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_what_one_reader_rounds_all_readers_take_rounded(half: torch.dtype) -> None:
    """A number less its own logsumexp is 0, also where the logsumexp alone converts the number."""

    def function(x):
        y = x * 1.1
        swapped = (x * 0.7).t()
        return (
            y - y.logsumexp(-1, keepdim=True),
            swapped - swapped.float().mean(-1, keepdim=True).to(half),
            y - y.to(torch.float64).to(half),
            torch.where(y > y.floor() + 1, 1.0, y - y.float().to(half)),
        )

    fast = turbotx.optimize(function)
    for came in fast((torch.arange(57).reshape(57, 1) * 1.7 - 40).to(half))[:1]:
        assert not came.any()
    x = (torch.arange(57).reshape(1, 57) * 1.7 - 40).to(half)
    came = fast(x)
    assert not came[1].any() and not came[2].any() and not came[3].any()
