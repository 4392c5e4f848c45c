"""Draws of random numbers are found, and only those of the code that is run."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from torch import nn

import turbotx
from turbotx.capture.host_random import find_draws


def test_draws_of_the_user_are_found_with_their_line() -> None:
    own = random.Random(0)
    assert find_draws(random.random).startswith("Python's random at ")
    assert f" at {__file__}:" in find_draws(lambda: own.random())


def test_what_sympy_draws_for_itself_is_not_the_users() -> None:
    drawn: list[int] = []

    def ask() -> None:
        drawn.append(1)
        sizes = [sympy.Symbol(f"s{k}_{len(drawn)}", integer=True) for k in range(2)]
        assert (sizes[0] * sizes[1] + 1).is_positive is None

    assert find_draws(ask) == ""
    with pytest.MonkeyPatch.context() as patch:  # that sympy drew at all
        patch.setattr("turbotx.capture.host_random._package", lambda frame: "another")
        assert "sympy" in find_draws(ask)


class Masked(nn.Module):
    """Draws in a branch that is not taken, as HuBERT's masks of training."""

    def __init__(self, draws: bool) -> None:
        super().__init__()
        self.draws, self.mask = draws, self.find_mask

    def find_mask(self, size: int) -> float:
        return np.random.rand() if self.draws else 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask(x.shape[0])


def test_a_generator_that_code_names_and_leaves_alone_costs_no_second_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("turbotx.capture.trace.find_draws", lambda *a: asked.append(a) or "numpy")
    x = torch.randn(2, 3)
    assert torch.equal(turbotx.optimize(Masked(False).eval())(x), x)
    assert not asked
    with pytest.raises(turbotx.TurbotxError, match="draws a number from numpy"):
        turbotx.optimize(Masked(True).eval())(x)
    assert asked


GENERATORS = (random.Random(1).random, np.random.default_rng(1).normal, np.random.rand)


@pytest.mark.parametrize("draw", GENERATORS)
def test_methods_of_generators_are_met_wherever_they_are_named(draw: Any) -> None:
    model = nn.Identity().eval()
    model.forward = lambda x: x * draw()
    default = lambda x, draw=draw: x * draw()  # noqa: E731
    keyword = lambda x, *, draw=draw: x * draw()  # noqa: E731
    for function in (model, default, keyword):
        with pytest.raises(turbotx.TurbotxError, match="draws a number from"):
            turbotx.optimize(function)(torch.randn(2, 3))
