"""Draws of random numbers are found, and only those of the code that is run."""

from __future__ import annotations

import random

import pytest
import sympy

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
