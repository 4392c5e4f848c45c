"""State that forward reaches by another way than an attribute of its own.

In: small modules, and a change of what they reach by a descriptor, their class, a weak reference,
a table keyed by modules or the environment. Out: what `optimize` makes of them, beside eager.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import turbotx

X = torch.linspace(-1, 2, 6).reshape(2, 3)
SCALES: dict[Any, float] = {}
CHOSEN: set[Any] = set()
WEAK: Any = weakref.WeakKeyDictionary()


class Gain:
    """A descriptor that holds its value itself."""

    value = 2.0

    def __get__(self, owner: Any, cls: type) -> float:
        return self.value


class PerModule:
    """A descriptor with a value for each object."""

    def __init__(self) -> None:
        self.values: Any = weakref.WeakKeyDictionary()

    def __get__(self, owner: Any, cls: type) -> float:
        return float(self.values.get(owner, 1.0))

    def __set__(self, owner: Any, value: float) -> None:
        self.values[owner] = value


class Config:
    gain = 2.0


class Reads(nn.Module):
    read: Callable[[Any], Any]
    gain, own = Gain(), PerModule()
    shared: ClassVar[dict[str, float]] = {"a": 2.0}

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(3, 3)
        self.config = Config()
        self.weak, self.proxy = weakref.ref(self.config), weakref.proxy(self.config)

    @classmethod
    def of_class(cls) -> float:
        return cls.shared["a"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x) * type(self).read(self)


def put(target: Any, name: Any, value: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        found = target(model) if callable(target) else target
        if isinstance(name, str) and not isinstance(found, (dict, type(os.environ))):
            setattr(found, name, value)
        else:
            found[name(model) if callable(name) else name] = value

    return change


CASES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], None]]] = {
    "descriptor": (lambda m: m.gain, put(lambda m: vars(Reads)["gain"], "value", 5.0)),
    "descriptor of each": (lambda m: m.own, put(lambda m: m, "own", 5.0)),
    "weak reference": (lambda m: m.weak().gain, put(lambda m: m.config, "gain", 5.0)),
    "proxy": (lambda m: m.proxy.gain, put(lambda m: m.config, "gain", 5.0)),
    "class method": (lambda m: m.of_class(), put(Reads.shared, "a", 5.0)),
    "class": (lambda m: type(m).shared["a"], put(Reads.shared, "a", 6.0)),
    "by the module": (lambda m: SCALES.get(m, 1.0), put(SCALES, lambda m: m, 5.0)),
    "by a part": (lambda m: WEAK.get(m.part, 1.0), put(WEAK, lambda m: m.part, 5.0)),
    "in a set": (lambda m: 3 if m.part in CHOSEN else 1, lambda m: CHOSEN.add(m.part)),
    "environment": (
        lambda m: float(os.environ.get("TTX_OF_A_TEST", 2)), put(os.environ, "TTX_OF_A_TEST", "5")
    ),
    "environment, asked whether": (
        lambda m: 1 + ("TTX_OF_A_TEST" in os.environ), put(os.environ, "TTX_OF_A_TEST", "1")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_change_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, change = CASES[name]
    monkeypatch.setattr(Reads, "read", staticmethod(read), raising=False)
    monkeypatch.setenv("TTX_OF_A_TEST", "0")  # so that it is put back
    monkeypatch.delenv("TTX_OF_A_TEST")
    model = Reads().eval()
    fast = turbotx.optimize(model, backend="aten")
    before = model(X)
    for _ in range(2):
        torch.testing.assert_close(fast(X), before)
    change(model)
    assert not torch.equal(model(X), before)
    for _ in range(2):
        torch.testing.assert_close(fast(X), model(X))
    assert fast.stats()["captures"] == 2


def test_a_hook_keeps_by_the_module_that_it_is_of() -> None:
    kept: dict[Any, torch.Tensor] = {}
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).eval()
    for part in model:
        part.register_forward_hook(lambda module, args, out: kept.__setitem__(module, out * 2))
    fast = turbotx.optimize(model, backend="aten")
    for x in (X, X + 1, X):
        fast(x)
        torch.testing.assert_close(kept[model[1]], model(x) * 2)
        assert set(kept) == set(model)
