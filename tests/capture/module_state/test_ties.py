"""A parameter that a list, a closure, a global or a partial holds too, and is then replaced in its
module: the other holder keeps the old one, as in eager mode."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import turbotx

KEPT: dict[str, torch.Tensor] = {}


class Holder(nn.Module):
    """Has a parameter, and reads it and another holder's."""

    def __init__(self, hold: Callable[[torch.Tensor], Any], read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.held, self.read = hold(self.weight), read
        KEPT["weight"] = self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.read(self.held)


HOLDERS: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], Any]]] = {
    "list": (lambda w: [w], lambda h: h[0]),
    "nested": (lambda w: ({"k": [1, w]}, 2), lambda h: h[0]["k"][1]),
    "partial": (lambda w: functools.partial(torch.mul, w), lambda h: h(2)),
    "namespace": (lambda w: types.SimpleNamespace(w=w), lambda h: h.w),
    "global": (lambda w: None, lambda h: KEPT["weight"]),
    "closure": (lambda w: lambda: w * 3, lambda h: h()),
}


@pytest.mark.parametrize("name", HOLDERS)
@torch.no_grad()
def test_a_replaced_parameter_stays_where_else_it_is_held(name: str) -> None:
    model, x = Holder(*HOLDERS[name]).eval(), torch.randn(2, 3)
    fast = turbotx.optimize(model, backend="aten")
    old = model.weight
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: model.weight.mul_(2),
        lambda: setattr(model, "weight", nn.Parameter(torch.zeros(3))),
        lambda: model.weight.add_(4),
        lambda: old.add_(1),
        lambda: setattr(model, "weight", old),
    ]
    for change in changes:
        change()
        torch.testing.assert_close(fast(x), model(x))


@torch.no_grad()
def test_where_nothing_else_holds_it_a_replaced_one_costs_no_capture() -> None:
    model, x = Holder(lambda w: [3.0], lambda h: h[0]).eval(), torch.randn(2, 3)
    KEPT.clear()
    fast = turbotx.optimize(model, backend="aten")
    for value in (1.0, 5.0):
        model.weight = nn.Parameter(torch.full((3,), value))
        torch.testing.assert_close(fast(x), model(x))
    assert fast.stats()["captures"] == 1


FACTOR = 2.0


class Base(nn.Module):
    """What `super()` of a class below it finds."""

    gain = 3.0

    def step(self, x: torch.Tensor) -> torch.Tensor:
        return x * FACTOR

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.step(x)


class Below(Base):
    """Its methods have the names of the base's."""

    def step(self, x: torch.Tensor) -> torch.Tensor:
        return super().step(x) - 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * super().gain


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (Base, "step", lambda self, x: x + 7),
        (Base, "forward", lambda self, x: x - 9),
        (Base, "gain", 5.0),
        (None, "FACTOR", 6.0),
    ],
)
def test_what_super_finds_is_a_guard(
    owner: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Below().eval(), torch.randn(2, 3)
    fast = turbotx.optimize(model, backend="aten")
    torch.testing.assert_close(fast(x), model(x))
    if owner is None:
        monkeypatch.setitem(globals(), name, value)
    else:
        monkeypatch.setattr(owner, name, value)
    torch.testing.assert_close(fast(x), model(x))
    monkeypatch.undo()
    torch.testing.assert_close(fast(x), model(x))
    assert fast.stats()["captures"] == 2
