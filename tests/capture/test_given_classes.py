"""Classes, modules, functions and enums among the arguments: what is read from them is a guard."""

from __future__ import annotations

import enum
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

import turbotx


class Rates:
    """A class that is an argument itself, or whose objects are."""

    rate = 2.0

    def __init__(self, shift: torch.Tensor) -> None:
        self.shift = shift

    @classmethod
    def of_class(cls, x: torch.Tensor) -> torch.Tensor:
        return x * cls.rate

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.rate + self.shift

    def both(self, x: torch.Tensor) -> torch.Tensor:
        return self.apply(x) - 1


class More(Rates):
    """What it reads is inherited."""


class Kind(enum.Enum):
    """Its members have attributes of their own."""

    ONE = 1


def plain(x: torch.Tensor) -> torch.Tensor:
    return x * FACTOR


FACTOR = 2.0

READS: dict[str, tuple[Callable[..., Any], Callable[[], Any], Any, str]] = {
    "class": (lambda x, c: x * c.rate, lambda: Rates, Rates, "rate"),
    "class method": (lambda x, c: c.of_class(x), lambda: More, Rates, "rate"),
    "object's class": (lambda x, o: o.both(x), lambda: Rates(torch.ones(2)), Rates, "rate"),
    "inherited": (lambda x, o: o.apply(x), lambda: More(torch.ones(2)), Rates, "rate"),
    "made of it": (lambda x, c: c(x).apply(x), lambda: More, Rates, "rate"),
    "module": (lambda x, m: x * m.rate, lambda: HOME, types.ModuleType, "rate"),
    "function": (lambda x, f: x * f.rate, lambda: plain, plain, "rate"),
    "member": (lambda x, k: x * k.rate, lambda: Kind.ONE, Kind.ONE, "rate"),
}
HOME = types.ModuleType("home_of_rates")


@pytest.mark.parametrize("name", READS)
def test_a_change_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, make, holder, attribute = READS[name]
    holder = HOME if name == "module" else holder
    monkeypatch.setattr(holder, attribute, 2.0, raising=False)
    fast, x = turbotx.optimize(model, backend="aten"), torch.arange(2.0)
    for captures, rate in enumerate((2.0, 5.0, -1.0), 1):
        setattr(holder, attribute, rate)
        for n in (2, 3):
            given = torch.cat([x] * n).reshape(n, 2)
            assert torch.equal(fast(given, make()), model(given, make()))
        assert fast.stats()["captures"] == captures
    setattr(holder, attribute, 5.0)
    given = x.expand(4, 2).contiguous()
    assert torch.equal(fast(given, make()), model(given, make()))
    assert fast.stats()["captures"] == 3


def test_a_replaced_method_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(x: torch.Tensor, given: Any) -> torch.Tensor:
        return given.both(x)

    fast, x, given = turbotx.optimize(model, backend="aten"), torch.arange(2.0), More(torch.ones(2))
    assert torch.equal(fast(x, given), model(x, given))
    monkeypatch.setattr(Rates, "apply", lambda self, x: x - self.shift)
    assert torch.equal(fast(x, given), model(x, given))
    monkeypatch.setattr(More, "apply", lambda self, x: x * 9, raising=False)
    assert torch.equal(fast(x, given), model(x, given))


def test_globals_of_a_function_that_is_an_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(x: torch.Tensor, call: Any) -> torch.Tensor:
        return call(x)

    fast, x = turbotx.optimize(model, backend="aten"), torch.ones(3)
    for factor in (2.0, 3.0):
        monkeypatch.setitem(globals(), "FACTOR", factor)
        assert torch.equal(fast(x, plain), x * factor)
    assert fast.stats()["captures"] == 2


def test_what_is_not_read_costs_no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, x = turbotx.optimize(lambda x, c: x * c.rate, backend="aten"), torch.ones(3)
    fast(x, Rates)
    monkeypatch.setattr(Rates, "other", 1, raising=False)
    fast(x, Rates)
    assert fast.stats()["captures"] == 1
