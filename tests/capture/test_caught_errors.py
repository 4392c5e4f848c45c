"""Code that catches what an operator raises: refused by name, since other calls do not raise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import turbotx
from turbotx.errors import CaptureError

LINEAR = nn.Linear(3, 3).eval().requires_grad_(False)


def adds(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    try:
        return x + y
    except RuntimeError:
        return x


def suppresses(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with contextlib.suppress(RuntimeError):
        x = torch.cat([x, y], 1)
    return x * 2


def of_a_layer(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    try:
        return LINEAR(x) + 1
    except RuntimeError:
        return x


def by_values(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    try:
        return x * len(x.numpy())
    except (RuntimeError, TypeError):
        return x


CASES: dict[str, tuple[Callable[..., Any], tuple[int, int], str]] = {
    "adds": (adds, (2, 2), "RuntimeError: The size of tensor a"),
    "suppresses": (suppresses, (3, 3), "RuntimeError"),
    "of a layer": (of_a_layer, (2, 4), "RuntimeError: a and b must have same reduction dim"),
    "by values": (by_values, (2, 3), "numpy"),
}


@pytest.mark.parametrize("name", CASES)
def test_code_that_catches_an_error_is_refused_by_name(name: str) -> None:
    model, shape, told = CASES[name]
    fast, x, y = turbotx.optimize(model, backend="aten"), torch.randn(shape), torch.randn(2, 3)
    with pytest.raises(CaptureError, match=rf"catches an error[^\n]*test_caught[^\n]*\n +.*{told}"):
        fast(x, y)


TABLE = {2: 5.0, 3: 7.0}


def by_a_number(x: torch.Tensor) -> torch.Tensor:
    try:
        return x * len(range(int(x.sum().item())))
    except Exception:
        return x


def by_its_text(x: torch.Tensor) -> torch.Tensor:
    try:
        return x * len(f"{x.sum().item():.0f}")
    except Exception:
        return x


def by_the_storage(x: torch.Tensor) -> torch.Tensor:
    with contextlib.suppress(Exception):
        return x * x.untyped_storage().nbytes()
    return x


def by_gradients(x: torch.Tensor) -> torch.Tensor:
    try:
        return x * 2 if x.requires_grad else x * 3
    except Exception:
        return x


REFUSED: dict[Callable[..., Any], str] = {
    by_a_number: "number that a tensor holds|catches an error",
    by_its_text: "number that a tensor holds",
    by_the_storage: "reads the storage of an input",
    by_gradients: "requires_grad of a tensor",
}


@pytest.mark.parametrize("function", REFUSED)
def test_code_that_catches_a_refusal_is_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(CaptureError, match=REFUSED[function]):
        turbotx.optimize(function, backend="aten")(torch.tensor([1.0, 2.0, 3.0]))


def test_an_error_of_a_size_in_a_table_is_not_believed() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        try:
            return x * TABLE[x.shape[0]]
        except Exception:
            return x

    fast = turbotx.optimize(function, backend="aten")
    for n in (2, 3, 4, 2):
        x = torch.randn(n)
        torch.testing.assert_close(fast(x), function(x))


def test_where_nothing_is_raised_it_is_captured_and_broadcasts() -> None:
    fast, y = turbotx.optimize(adds, backend="aten"), torch.randn(2, 3)
    torch.testing.assert_close(fast(y, y), y + y)
    with pytest.raises(CaptureError, match="catches an error"):
        fast(y, torch.randn(4, 3))
    for x in (torch.randn(1, 3), torch.randn(2, 1), torch.randn(2, 3)):
        torch.testing.assert_close(fast(x, y), x + y)


def test_an_attribute_that_is_not_there_is_no_error() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if hasattr(x, "keys") else x + (getattr(x, "grad", None) is None)

    x = torch.ones(3)
    torch.testing.assert_close(turbotx.optimize(model, backend="aten")(x), model(x))
