"""Where values come from that a forward reads by odd ways: each is noticed when it changes."""

from __future__ import annotations

import collections
import enum
import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import turbotx

X = torch.linspace(-2, 3, 12).reshape(3, 4)
FACTOR = 2.0
LATE = types.ModuleType("imported_late_by_a_user")
LATE.factor = 2.0  # type: ignore[attr-defined]


class Kind(enum.Enum):
    ONE = 1
    TWO = 2


class Base:
    k = 2.0


class Sub(Base):
    class Inner:
        k = 2.0


class Small:
    def __init__(self) -> None:
        self.k = 2.0


class Calling(Small):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.k * FACTOR


@functools.lru_cache
def cached(n: int) -> float:
    return n * FACTOR


def take(container: dict[str, float] = {"k": 2.0}) -> float:  # noqa: B006
    return container["k"]


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k, self.kind = 2.0, Kind.ONE
        self.array, self.queue = np.ones(4, np.float32), collections.deque([1.0, 2.0])
        self.called, self.own = Calling(), Small()
        self.held = types.SimpleNamespace(deep=[1.0, {"k": 2.0}], objects=[Small()])
        self.parts = [nn.Linear(4, 4)]
        self.functions = {"a": self.by_name}

    @functools.cached_property
    def twice(self) -> float:
        return self.k * 2

    @property
    def of_own(self) -> Small:
        return self.own

    def by_name(self, x: torch.Tensor) -> torch.Tensor:
        return x * FACTOR


WAYS: dict[str, Callable[[Odd, torch.Tensor], torch.Tensor]] = {
    "vars": lambda m, x: x * vars(m)["k"],
    "cached property": lambda m, x: x * m.twice,
    "enum": lambda m, x: x * m.kind.value,
    "array": lambda m, x: x * torch.from_numpy(m.array),
    "queue": lambda m, x: x * m.queue[-1],
    "callable object": lambda m, x: m.called(x),
    "object of a property": lambda m, x: x * m.of_own.k,
    "dict in a list": lambda m, x: x * m.held.deep[1]["k"],
    "object in a list": lambda m, x: x * m.held.objects[0].k,
    "hidden module": lambda m, x: m.parts[0](x),
    "method in a dict": lambda m, x: m.functions["a"](x),
    "base class": lambda m, x: x * Sub.k,
    "class in a class": lambda m, x: x * Sub.Inner.k,
    "cached function": lambda m, x: x * cached(3),
    "default": lambda m, x: x * take(),
}


def late(m: Odd, x: torch.Tensor) -> torch.Tensor:
    import imported_late_by_a_user  # type: ignore[import-not-found]

    return x * imported_late_by_a_user.factor


WAYS["import"] = late
CHANGES: dict[str, Callable[[Odd], Any]] = {
    "vars": lambda m: setattr(m, "k", 3.0),
    "cached property": lambda m: vars(m).update(k=3.0, twice=6.0),
    "enum": lambda m: setattr(m, "kind", Kind.TWO),
    "array": lambda m: m.array.__setitem__(0, 5),
    "queue": lambda m: m.queue.append(5.0),
    "callable object": lambda m: setattr(m.called, "k", 3.0),
    "object of a property": lambda m: setattr(m.own, "k", 3.0),
    "dict in a list": lambda m: m.held.deep[1].update(k=3.0),
    "object in a list": lambda m: (
        m.held.objects.insert(0, Calling()) or setattr(m.held.objects[0], "k", 3.0)
    ),
    "hidden module": lambda m: setattr(m.parts[0], "weight", nn.Parameter(torch.eye(4))),
    "base class": lambda m: setattr(Base, "k", Base.k + 1),
    "class in a class": lambda m: setattr(Sub.Inner, "k", Sub.Inner.k + 1),
    "default": lambda m: take.__defaults__[0].update(k=3.0),  # type: ignore[index]
    "import": lambda m: setattr(LATE, "factor", 3.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, LATE.__name__, LATE)
    monkeypatch.setattr(Odd, "forward", WAYS[name])
    model, right = Odd().eval(), Odd().eval()
    right.parts = model.parts
    fast = turbotx.optimize(model, backend="aten")
    with torch.no_grad():
        before = fast(X)
        torch.testing.assert_close(before, right(X))
        CHANGES[name](model)
        torch.testing.assert_close(fast(X), model(X))
        assert not torch.equal(model(X), before), "the change changes nothing"


@pytest.mark.parametrize("name", ["callable object", "method in a dict", "cached function"])
def test_a_global_behind_it_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Odd, "forward", WAYS[name])
    model = Odd().eval()
    fast = turbotx.optimize(model, backend="aten")
    before = fast(X)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    cached.cache_clear()
    torch.testing.assert_close(fast(X), model(X))
    assert not torch.equal(fast(X), before)


def test_a_function_of_a_library_is_taken_as_it_is() -> None:
    from turbotx.capture.module_state.names import find_names

    def uses(x: torch.Tensor) -> Any:
        return nn.utils.parameters_to_vector([x]) * FACTOR + len(WAYS)

    names = find_names([uses], lambda value: None)
    texts = {place.text.rpartition(".")[2] for place in names.places.values()}
    assert {"parameters_to_vector", "FACTOR", "WAYS"} <= texts
    assert "_check_param_device" not in texts, "what the library's function itself refers to"
