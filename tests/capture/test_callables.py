"""Partials, callable objects, bound methods and functions: what they hold is watched.

In: callables of every kind that optimize takes. Out: the same results as by calling them, also
after the tensors and modules that they hold were changed or replaced.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import turbotx
from turbotx.errors import TrainingError

X = torch.randn(2, 5)
SCALE = torch.ones(5)


def close(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class Scorer:
    """A callable object with a weight, a module and a list."""

    def __init__(self) -> None:
        self.weight, self.layer, self.power = torch.rand(5), nn.Linear(5, 5).eval(), 2
        self.list = [torch.rand(5)]

    def __call__(self, x):
        return self.layer(x * self.weight) ** self.power + self.list[0]

    def score(self, x):
        return self(x).sum(-1)


def test_partials() -> None:
    fast = turbotx.optimize(functools.partial(F.softmax, dim=-1))
    close(fast(X), X.softmax(-1))
    shift = torch.ones(5)
    moved = functools.partial(torch.add, shift, alpha=2)
    fast = turbotx.optimize(moved)
    close(fast(X), moved(X))
    shift.fill_(7.0)
    close(fast(X), moved(X))
    model = nn.Linear(5, 3).eval()
    fast = turbotx.optimize(functools.partial(model))
    with torch.no_grad():
        close(fast(X), model(X))
        model.weight.fill_(1.0)
        close(fast(X), model(X))
    assert fast.stats()["captures"] == 1


@pytest.mark.parametrize("method", ["__call__", "score"])
@torch.no_grad()
def test_objects_and_their_methods(method: str) -> None:
    scorer = Scorer()
    fast = turbotx.optimize(scorer if method == "__call__" else scorer.score)
    plain = getattr(scorer, method)

    def change_weight() -> None:
        scorer.weight.fill_(3.0)

    def replace_weight() -> None:
        scorer.weight = torch.rand(5)

    def change_layer() -> None:
        scorer.layer.weight.fill_(0.5)

    def replace_layer() -> None:
        scorer.layer = nn.Linear(5, 5).eval()

    def replace_in_list() -> None:
        scorer.list[0] = torch.rand(5)

    def change_number() -> None:
        scorer.power = 3

    close(fast(X), plain(X))
    for change in (
        change_weight, replace_weight, change_layer, replace_layer, replace_in_list,
        *([change_number] if method == "score" else []),
    ):  # fmt: skip
        change()
        close(fast(X), plain(X))
        close(fast(X[:1]), plain(X[:1]))


@torch.no_grad()
def test_bound_methods_of_a_module() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Dropout(), nn.Linear(5, 2)).eval()
    fast = turbotx.optimize(model.forward)
    close(fast(X), model(X))
    model[0].weight.fill_(0.25)
    model[2].bias = nn.Parameter(torch.ones(2))
    close(fast(X), model(X))
    model.train()
    with pytest.raises(TrainingError):
        fast(X)


@torch.no_grad()
def test_functions_over_globals_and_closures(monkeypatch) -> None:
    layer, shift = nn.Linear(5, 5).eval(), torch.zeros(5)

    def function(x):
        return layer(x * SCALE) + shift

    fast = turbotx.optimize(function)
    close(fast(X), function(X))
    layer.bias.fill_(4.0)
    shift.fill_(2.0)
    close(fast(X), function(X))
    shift = torch.rand(5)
    close(fast(X), function(X))
    monkeypatch.setitem(globals(), "SCALE", torch.rand(5))
    close(fast(X), function(X))
    layer = nn.Linear(5, 5).eval()
    close(fast(X), function(X))


@torch.no_grad()
def test_a_partial_of_something_optimized() -> None:
    model = nn.Linear(5, 2).eval()
    close(functools.partial(turbotx.optimize(model))(X), model(X))
    close(turbotx.optimize(turbotx.optimize(model).forward)(X), model(X))
