"""An object that a trace reads by way of a container, a namespace, a method or the like.

In: a module that reads a configuration through a holder. Out: what `optimize` makes of it after
the configuration, or what the holder holds, is another one, beside the module itself.
"""

from __future__ import annotations

import argparse
import array
import collections
import contextvars
import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import turbotx

X = torch.linspace(-1, 2, 6).reshape(2, 3)


class Config:
    def __init__(self) -> None:
        self.gain = 2.0

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain


class Reader(nn.Module):
    def __init__(self, holder: Any, read: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.holder, self.read = holder, read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self.holder, x) + 1


class Listed(list[Any]):
    """A list with attributes."""


def multiply(x: torch.Tensor, config: Config) -> torch.Tensor:
    return x * config.gain


def listed(config: Config) -> Listed:
    made = Listed()
    made.config = config  # type: ignore[attr-defined]
    return made


Holder = tuple[Callable[[Config], Any], Callable[[Any, torch.Tensor], torch.Tensor]]
HOLDERS: dict[str, Holder] = {
    "namespace": (lambda c: types.SimpleNamespace(c=c), lambda h, x: x * h.c.gain),
    "arguments": (lambda c: argparse.Namespace(c=c), lambda h, x: x * h.c.gain),
    "namespace in a dict": (
        lambda c: {"n": types.SimpleNamespace(c=[c])}, lambda h, x: x * h["n"].c[0].gain,
    ),
    "UserDict": (lambda c: collections.UserDict(c=c), lambda h, x: x * h["c"].gain),
    "UserList": (lambda c: collections.UserList([c]), lambda h, x: x * h[0].gain),
    "ChainMap": (lambda c: collections.ChainMap({}, {"c": c}), lambda h, x: x * h["c"].gain),
    "mapping proxy": (lambda c: types.MappingProxyType({"c": c}), lambda h, x: x * h["c"].gain),
    "deque": (lambda c: collections.deque([c]), lambda h, x: x * h[0].gain),
    "partial": (lambda c: functools.partial(multiply, config=c), lambda h, x: h(x)),
    "bound method": (lambda c: c.scaled, lambda h, x: h(x)),
    "attribute of a list": (listed, lambda h, x: x * h.config.gain),
}  # fmt: skip


@pytest.mark.parametrize("name", HOLDERS)
def test_a_held_object_that_changes_is_noticed(name: str) -> None:
    make, read = HOLDERS[name]
    config = Config()
    model = Reader(make(config), read).eval()
    fast = turbotx.optimize(model, backend="aten")
    for gain in (2.0, 5.0, 2.0):
        config.gain = gain
        torch.testing.assert_close(fast(X), model(X))
    assert fast.stats()["captures"] == 2


def put(holder: Any, key: Any, value: Any) -> None:
    holder[key] = value


PLAIN: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "UserDict": (collections.UserDict({0: 2.0}), lambda h: put(h, 0, 3.0)),
    "UserList": (collections.UserList([2.0]), lambda h: put(h, 0, 3.0)),
    "ChainMap": (collections.ChainMap({}, {0: 2.0}), lambda h: put(h, 0, 3.0)),
    "array": (array.array("d", [2.0]), lambda h: put(h, 0, 3.0)),
    "bytearray": (bytearray(b"\x02"), lambda h: put(h, 0, 3)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_a_holder_holds_is_noticed(name: str) -> None:
    holder, change = PLAIN[name]
    model = Reader(holder, lambda h, x: x * h[0]).eval()
    fast = turbotx.optimize(model, backend="aten")
    torch.testing.assert_close(fast(X), model(X))
    change(holder)
    torch.testing.assert_close(fast(X), model(X))


def test_a_mapping_behind_a_proxy_is_noticed() -> None:
    behind = {0: 2.0}
    model = Reader(types.MappingProxyType(behind), lambda h, x: x * h[0]).eval()
    fast = turbotx.optimize(model, backend="aten")
    torch.testing.assert_close(fast(X), model(X))
    behind[0] = 5.0
    torch.testing.assert_close(fast(X), model(X))


class Settings(threading.local):
    def __init__(self) -> None:
        self.gain = 1.0


SETTINGS, LOCAL, VARIABLE = Settings(), threading.local(), contextvars.ContextVar("gain")
LOCAL.gain = 1.0


@pytest.mark.parametrize(
    ("model", "change"),
    [
        (lambda x: x * SETTINGS.gain, lambda gain: setattr(SETTINGS, "gain", gain)),
        (lambda x: x * LOCAL.gain, lambda gain: setattr(LOCAL, "gain", gain)),
        (lambda x: x * VARIABLE.get(), lambda gain: VARIABLE.set(gain)),
    ],
)
def test_what_a_thread_or_a_context_has_of_its_own(model: Any, change: Any) -> None:
    x, found = torch.ones(2), []
    change(1.0)
    fast = turbotx.optimize(model, backend="aten")

    def elsewhere() -> None:
        change(3.0)
        found.append(fast(x))

    assert torch.equal(fast(x), x)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert torch.equal(found[0], x * 3)
    assert torch.equal(fast(x), x)
    change(3.0)
    assert torch.equal(fast(x), x * 3)
    assert fast.stats()["captures"] == 2


@pytest.mark.parametrize("depth", [0, 1])
def test_the_order_of_an_ordered_dict(depth: int) -> None:
    table = collections.OrderedDict(a=2.0, b=torch.ones(3), c=3.0)

    def model(x: torch.Tensor) -> torch.Tensor:
        for value in table.values() if depth else model.own.values():  # type: ignore[attr-defined]
            x = x * value + 1
        return x

    model.own = table  # type: ignore[attr-defined]
    fast, x = turbotx.optimize(model, backend="aten"), torch.randn(2, 3)
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: table.move_to_end("a"),
        lambda: table.move_to_end("c", last=False),
        lambda: table.update(a=7.0),
        lambda: table.popitem(last=False),
    ]
    for change in changes:
        change()
        torch.testing.assert_close(fast(x), model(x))
        torch.testing.assert_close(fast(x[:1]), model(x[:1]))
    assert fast.stats()["captures"] == len(changes)
    table.move_to_end("b")
    torch.testing.assert_close(fast(x), model(x))
    table.move_to_end("a")
    torch.testing.assert_close(fast(x), model(x))
    assert fast.stats()["captures"] == len(changes) + 1


def test_a_set_that_is_as_before_finds_its_capture() -> None:
    known, x = {1, 2}, torch.randn(2, 3)

    def model(x: torch.Tensor) -> torch.Tensor:
        return x * len(known)

    fast = turbotx.optimize(model, backend="aten")
    for change in (set().add, known.add, known.discard, known.add, known.discard):
        change(3)
        for n in (1, 2):
            torch.testing.assert_close(fast(x[:n]), model(x[:n]))
    assert fast.stats()["captures"] == 2


class Lookup:
    """Gives what a dict of its own holds, which it reads past `__getattribute__`."""

    def __init__(self) -> None:
        object.__setattr__(self, "_held", {"gain": 2.0})

    def __getattr__(self, name: str) -> Any:
        try:
            return object.__getattribute__(self, "_held")[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._held[name] = value


def test_attributes_that_a_class_computes() -> None:
    class Scaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.settings: Any = Lookup()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.settings.gain + getattr(self.settings, "shift", 0.0)

    model = Scaling().eval()
    fast = turbotx.optimize(model, backend="aten")
    for change in ({}, {"gain": 5.0}, {"shift": 7.0}):
        for name, value in change.items():
            setattr(model.settings, name, value)
        torch.testing.assert_close(fast(X), model(X))
    assert fast.stats()["captures"] == 3 and torch.equal(fast(X), model(X))
    assert fast.stats()["captures"] == 3
