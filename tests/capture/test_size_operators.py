"""Operators of sizes: floats in Python's own steps, and comparisons where an op takes a bool."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import turbotx
from turbotx.errors import CaptureError

SIZES = (3, 7, 11, 13, 1)


def test_floats_of_sizes_are_pythons_own() -> None:
    def model(x: torch.Tensor) -> tuple[float, ...]:
        n, m = x.shape
        return (
            n * 0.1 * 3, 0.1 * n + 0.2 + 0.3, 1.1 - n + 0.3, n * 0.1 - n * 0.3, 3 * (0.1 * n) - m,
            (n + 0.1) * (m + 0.7) * (n + 0.3), n / 3 / 7, -(n * 0.7) * 10,
        )  # fmt: skip

    fast = turbotx.optimize(model, backend="aten")
    for n in SIZES:
        assert fast(torch.ones(n, 4)) == model(torch.ones(n, 4))
    assert fast.stats()["captures"] == 1


def test_a_guard_on_a_float_of_sizes_is_pythons_own() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        ceil = torch.zeros(math.ceil(x.shape[0] * 0.7 * 10))
        return ceil + 1 if x.shape[0] * 0.1 * 3 > 2.1 else ceil

    fast = turbotx.optimize(model, backend="aten")
    for n in SIZES:
        assert torch.equal(fast(torch.ones(n, 4)), model(torch.ones(n, 4)))
    assert fast.stats()["captures"] == 2


def test_a_number_of_elements_that_is_asked_for_as_an_int_is_a_guard() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(int(x.shape[0] * 0.1 * 3 * 10))

    fast = turbotx.optimize(model, backend="aten")
    for n in SIZES:
        assert torch.equal(fast(torch.ones(n, 4)), model(torch.ones(n, 4)))


def test_a_bool_that_an_op_takes_is_a_guard() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        y = F.scaled_dot_product_attention(x, x, x, is_causal=x.shape[2] > 1)
        return y.sum(1, keepdim=x.shape[0] == x.shape[1])

    fast = turbotx.optimize(model, backend="aten")
    for shape in ((2, 2, 5, 4), (2, 3, 5, 4), (2, 3, 1, 4), (3, 3, 1, 4), (4, 4, 7, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(fast(x), model(x))
    assert fast.stats()["captures"] == 4


TABLE = {"3": 2.0, "7": 3.0}


@pytest.mark.parametrize(
    "model",
    [
        lambda x: {f"n{x.shape[0]}": x},
        lambda x: {f"{x.shape[0]:03d} {x.shape[0] / 2:.2f} {x.shape} {x.shape[0] > 2}": x},
        lambda x: {f"%s %d {x.shape}" % (x.shape[0], x.shape[0]): x, repr(x.shape): 1},
        lambda x: x * TABLE.get(str(x.shape[0]), 7.0),
        lambda x: x * {True: 2, False: 3}[x.shape[0] > 3],
        lambda x: x * np.sqrt(x.shape[0]),
    ],
)
def test_a_size_that_is_used_as_text_or_as_a_key_is_the_number(model: Any) -> None:
    fast = turbotx.optimize(model, backend="aten")
    for n in (3, 7, 1):
        x = torch.ones(n, 4)
        ours, right = fast(x), model(x)
        if isinstance(right, dict):
            assert list(ours) == list(right)
        torch.testing.assert_close(ours, right)


def test_other_code_may_write_sizes_as_it_likes() -> None:
    fast = turbotx.optimize(lambda x: (x @ x.mT).softmax(-1).reshape(-1), backend="aten")
    for n in SIZES:
        fast(torch.ones(n, 4))
    assert fast.stats()["captures"] == 1


def test_a_size_is_an_int_to_the_models_code() -> None:
    def pair(n: Any) -> tuple[int, int]:
        return (n, n) if isinstance(n, int) else tuple(n)

    def model(x: torch.Tensor) -> torch.Tensor:
        n, matched = x.shape[1], 0
        match n:
            case int(size):
                matched = size
        kinds = (
            isinstance(n, numbers.Integral), isinstance(n / 2, float), isinstance(n > 1, bool),
            not isinstance(n, (str, list)), n.__class__ is int,
        )  # fmt: skip
        return x.new_zeros(pair(n)) + matched + sum(2**k * kind for k, kind in enumerate(kinds))

    fast = turbotx.optimize(model, backend="aten")
    for n in SIZES:
        torch.testing.assert_close(fast(torch.ones(2, n)), model(torch.ones(2, n)))
    assert fast.stats()["captures"] == 1
    assert "__class__" not in vars(torch.SymInt)


DIVISIONS: dict[str, Callable[[int], Any]] = {
    "truediv": lambda n: 6 / (n - 2),
    "of a quotient": lambda n: 1 / (1 / (n - 3)),
    "floordiv": lambda n: 7 // (n - 2),
    "of a rounded size": lambda n: n // (n // 4),
    "mod": lambda n: 10 % (n - 2),
    "divmod": lambda n: divmod(n, n - 2)[1],
    "by a float": lambda n: n / (0.5 * n - 1),
    "negative power": lambda n: (n - 2) ** -2,
    "power of a size": lambda n: 0 ** (3 - n),
}


@pytest.mark.parametrize("name", DIVISIONS)
def test_a_division_by_zero_raises_as_pythons(name: str) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return x * DIVISIONS[name](x.shape[0])

    def careful(x: torch.Tensor) -> torch.Tensor:
        try:
            return x + DIVISIONS[name](x.shape[0])
        except ZeroDivisionError:
            return x - 100

    fast, caught = turbotx.optimize(model, backend="aten"), turbotx.optimize(careful)
    raised = 0
    for n in (7, 2, 3, 4, 1):
        x = torch.arange(1.0, n + 1)
        torch.testing.assert_close(caught(x), careful(x))
        try:
            wanted = model(x)
        except ZeroDivisionError:
            raised += 1
            with pytest.raises(CaptureError, match="ZeroDivisionError"):
                fast(x)
        else:
            torch.testing.assert_close(fast(x), wanted)
    assert raised
