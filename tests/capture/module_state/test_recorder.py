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
from turbotx.capture.module_state import recorder
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
    names = ("__getattribute__", "__setattr__")
    before = [(vars(c).get(n), getattr(c, n)) for c in watched for n in names]
    yield
    assert [(vars(c).get(n), getattr(c, n)) for c in watched for n in names] == before
    assert not recorder.patched and not recorder.saved_methods


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
