"""Recorder: what classes look like once a trace is over, and objects that only the trace shows.

In: models that reach objects by way of functions that attributes hold. Out: every class as it was
before, whether the trace went well or not, and a capture of its own for each state of the objects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import turbotx
from tests.models import small_model, token_inputs
from turbotx.capture.module_state import attribute_methods
from turbotx.errors import CaptureError


class Plain:
    def __init__(self) -> None:
        self.scale = 2.0


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 3.0


PLAIN, SLOTTED = Plain(), Slotted()


def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * PLAIN.scale * SLOTTED.scale


class Rule:
    def __init__(self, apply: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.apply = apply


class Ruled(nn.Module):
    def __init__(self, rule: Any) -> None:
        super().__init__()
        self.rules = {"first": (rule,)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.rules["first"][0].apply(x)
        return made + 1


def refuse(x: torch.Tensor) -> torch.Tensor:
    raise ValueError("no")


@pytest.fixture
def untouched():
    """Classes that a recorder may replace functions of, which are to be themselves afterwards."""
    watched = (nn.Module, Plain, Slotted, Rule)
    names = ("__getattribute__", "__setattr__", "__init__")
    before = [(vars(c).get(n), getattr(c, n)) for c in watched for n in names]
    yield
    assert [(vars(c).get(n), getattr(c, n)) for c in watched for n in names] == before
    assert not attribute_methods.patched and not attribute_methods.saved_methods


@pytest.mark.usefixtures("untouched")
def test_objects_of_functions_that_only_the_trace_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Ruled(Rule(scaled)).eval()
    fast = turbotx.optimize(model)
    x = torch.randn(2, 3)
    torch.testing.assert_close(fast(x), model(x))
    for owner in (PLAIN, SLOTTED):
        monkeypatch.setattr(owner, "scale", 7.0)
        torch.testing.assert_close(fast(x), model(x))


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("way", ["flash", "fused-softmax"])
def test_a_models_classes_are_themselves_after_a_trace(way: str) -> None:
    fast = turbotx.optimize(small_model("bert", layers=1), attention=way)
    fast(**token_inputs(2, 5))


@pytest.mark.usefixtures("untouched")
def test_classes_are_themselves_after_a_trace_that_failed() -> None:
    with pytest.raises((CaptureError, ValueError)):
        turbotx.optimize(Ruled(Rule(refuse)).eval())(torch.randn(2, 3))


class Gain(nn.Module):
    """Made anew by each call."""

    factor = 2.0

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.bias, self.own = bias, nn.Identity()
        self.own.scale = 0.5

    def forward(self, x):
        return x * self.factor * self.own.scale + self.bias


class MakesModules(nn.Module):
    """Runs some of its layers in a list, and a module of the user's, which it both makes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.bias = nn.ModuleList(nn.Linear(3, 3) for _ in range(3)), 1.0

    def forward(self, x):
        kept = self.layers[1:]
        kept.append(self.layers[0])
        kept.gain = Gain(self.bias)
        for layer in kept:
            x = layer(x) if isinstance(layer, nn.Linear) else x
        return kept.gain(x)


@pytest.mark.usefixtures("untouched")
def test_modules_that_a_call_makes_are_made_of_what_is_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = MakesModules().eval(), torch.randn(2, 3)
    fast = turbotx.optimize(model)

    def same() -> None:
        for _ in range(2):
            torch.testing.assert_close(fast(x), model(x))

    same()
    assert fast.stats()["captures"] == 1
    monkeypatch.setattr(Gain, "factor", 5.0)
    same()
    model.bias = -3.0
    same()
    model.layers[1] = nn.Linear(3, 3)
    same()
    model.layers[0] = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    same()
    del model.layers[2]
    same()
