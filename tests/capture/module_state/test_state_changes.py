"""Every kind of state that a forward can read: after a change, a call means what eager does.

In: small modules and one change each. Out: what `optimize` makes of them after the change, beside
the module itself; also back again, where the first capture is found again.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import turbotx
from turbotx.errors import TrainingError

X = torch.linspace(-2, 3, 12).reshape(3, 4)
SCALE = 2.0
SHIFTS = {"first": 1.0, "others": [0.5, 0.25]}
TABLE = torch.arange(4.0)
SETTINGS = types.ModuleType("settings_of_a_user")
SETTINGS.eps = 0.5  # type: ignore[attr-defined]


@dataclasses.dataclass
class Config:
    gain: float = 2.0
    nested: dict[str, Any] = dataclasses.field(default_factory=lambda: {"a": {"b": 1.0}})


class SlottedConfig:
    __slots__ = ("gain",)

    def __init__(self) -> None:
        self.gain = 3.0


class Translating:
    """As transformers' configurations: an old name of an attribute stands for the new one."""

    def __init__(self) -> None:
        self.hidden = 2.0

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__("hidden" if name == "size" else name)


def helper(x: torch.Tensor) -> torch.Tensor:
    return x * SCALE + SHIFTS["others"][0]


class Rich(nn.Module):
    """Reads about everything."""

    of_class = 1.5

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.parts = nn.ModuleList([nn.Linear(4, 4), nn.Tanh()])
        self.drop = nn.Dropout(0.5)
        self.flag, self.number, self.word = True, 1.0, "mul"
        self.config, self.slotted, self.old = Config(), SlottedConfig(), Translating()
        self.options = types.SimpleNamespace(power=2)
        self.factors = [1.0, 2.0]
        self.names = {"x", "y"}
        self.call = functools.partial(torch.add, alpha=2)
        self.table = torch.ones(4)
        self.register_buffer("mask", torch.ones(4))
        self.gamma = nn.Parameter(torch.ones(4))

    @property
    def bias(self) -> float:
        return self.number * 3

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) if self.flag else x
        x = x * self.number + self.bias if self.word == "mul" else x - self.number
        x = x * self.config.gain + self.config.nested["a"]["b"] + self.slotted.gain
        x = x * self.old.size * self.of_class + self.options.power
        for factor in self.factors:
            x = x * factor
        for part in self.parts:
            x = part(x)
        x = self.call(self.inner(x), x) + len(self.names)
        x = (x + self.table + self.mask) * self.gamma
        if hasattr(self, "extra"):
            x = x + self.extra
        return helper(self.second(self.drop(x))) + SETTINGS.eps + TABLE


def times_two(module: nn.Module, args: Any, out: torch.Tensor | None = None) -> Any:
    return out * 2 if out is not None else (args[0] * 2,)


def set_item(container: Any, key: Any, value: Any) -> None:
    container[key] = value


CHANGES: dict[str, Callable[[Rich], Any]] = {
    "flag": lambda m: setattr(m, "flag", False),
    "number": lambda m: setattr(m, "number", -1.0),
    "number's type": lambda m: setattr(m, "number", 0),
    "string": lambda m: setattr(m, "word", "sub"),
    "attribute added": lambda m: setattr(m, "extra", 5.0),
    "attribute of a dataclass": lambda m: setattr(m.config, "gain", 7.0),
    "nested dict": lambda m: set_item(m.config.nested["a"], "b", 9.0),
    "config replaced": lambda m: setattr(m, "config", Config(gain=4.0)),
    "slot": lambda m: setattr(m.slotted, "gain", 9.0),
    "translated attribute": lambda m: setattr(m.old, "hidden", 9.0),
    "namespace": lambda m: setattr(m.options, "power", 9),
    "list appended": lambda m: m.factors.append(3.0),
    "list item": lambda m: set_item(m.factors, 0, 3.0),
    "set": lambda m: m.names.add("z"),
    "partial": lambda m: setattr(m, "call", functools.partial(torch.add, alpha=3)),
    "submodule replaced": lambda m: setattr(m, "first", nn.Linear(4, 4)),
    "submodule of another class": lambda m: setattr(m, "first", nn.Identity()),
    "submodule in a list": lambda m: set_item(m.parts, 1, nn.ReLU()),
    "submodule removed": lambda m: m.parts.pop(1),
    "submodule added": lambda m: m.parts.append(nn.Sigmoid()),
    "plain tensor replaced": lambda m: setattr(m, "table", torch.full((4,), 3.0)),
    "plain tensor in place": lambda m: m.table.mul_(3),
    "buffer of other sizes": lambda m: setattr(m, "mask", torch.ones(3, 4) * 2),
    "parameter of other sizes": lambda m: setattr(m, "gamma", nn.Parameter(torch.ones(1) * 3)),
    "forward hook": lambda m: m.first.register_forward_hook(times_two),
    "forward pre-hook": lambda m: m.first.register_forward_pre_hook(times_two),
    "hook of the whole": lambda m: m.register_forward_hook(times_two),
    "forward replaced": lambda m: setattr(m.first, "forward", lambda x: x * 3),
    "method replaced": lambda m: setattr(m, "inner", lambda x: x * 3),
    "parametrized": lambda m: parametrize.register_parametrization(m.second, "weight", nn.Tanh()),
    "pruned": lambda m: prune.l1_unstructured(m.second, "weight", 0.5),
    "weight norm": lambda m: nn.utils.parametrizations.weight_norm(
        m.second
    ).parametrizations.weight.original0.mul_(2),
    "spectral norm": lambda m: nn.utils.parametrizations.spectral_norm(m.second).eval(),
    "tied": lambda m: setattr(m.second, "weight", m.first.weight),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name: str) -> None:
    model = Rich().eval()
    fast = turbotx.optimize(model, backend="aten")
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X))
        before = model(X)
        CHANGES[name](model)
        assert not torch.equal(model(X), before), "the change changes nothing"
        for _ in range(2):
            torch.testing.assert_close(fast(X), model(X))
    assert fast.stats()["captures"] <= 2


NAMES: dict[str, tuple[Any, str, Any]] = {
    "global number": (globals(), "SCALE", 5.0),
    "global container": (SHIFTS, "others", [9.0]),
    "global tensor": (globals(), "TABLE", torch.ones(4)),
    "global function": (globals(), "helper", lambda x: x * 9),
    "another file's global": (vars(SETTINGS), "eps", 0.75),
    "a library's function": (vars(torch.nn.functional), "linear", lambda x, w, b: x @ w + b),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_global_is_noticed_and_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Rich().eval()
    fast = turbotx.optimize(model, backend="aten")
    with torch.no_grad():
        before = fast(X)
        scope, key, value = NAMES[name]
        with monkeypatch.context() as patch:
            patch.setitem(scope, key, value)
            assert not torch.equal(model(X), before)
            torch.testing.assert_close(fast(X), model(X))
        torch.testing.assert_close(fast(X), before)
    assert fast.stats()["captures"] == 2


def test_a_global_tensor_changed_in_place_is_noticed() -> None:
    model = Rich().eval()
    fast = turbotx.optimize(model, backend="aten")
    fast(X)
    with torch.no_grad():
        TABLE.add_(1)
        torch.testing.assert_close(fast(X), model(X))
        TABLE.sub_(1)
        torch.testing.assert_close(fast(X), model(X))


def test_modules_that_a_function_reaches_are_noticed() -> None:
    part = nn.Linear(4, 4, bias=False).eval()
    parts = types.SimpleNamespace(part=part)

    @turbotx.optimize(backend="aten")
    def through(x: torch.Tensor) -> torch.Tensor:
        return parts.part(x)

    with torch.no_grad():
        torch.testing.assert_close(through(X), part(X))
        part.weight.mul_(2)
        for _ in range(2):
            torch.testing.assert_close(through(X), part(X))
        assert through.stats()["captures"] == 1  # type: ignore[attr-defined]
        part.weight = nn.Parameter(torch.eye(4))
        torch.testing.assert_close(through(X), X)
        part.weight.data = torch.eye(4) * 2
        torch.testing.assert_close(through(X), X * 2)
        parts.part = nn.Identity()
        torch.testing.assert_close(through(X), X)
    part.train()
    torch.testing.assert_close(through(X), X)


def test_changed_classes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Module):
        factor = 2.0

        def part(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.part(x) * self.factor

    model = Own().eval()
    fast = turbotx.optimize(model, backend="aten")
    fast(X)
    Own.factor = 3.0
    torch.testing.assert_close(fast(X), X * 3)
    Own.part = lambda self, x: x + 1  # type: ignore[method-assign]
    torch.testing.assert_close(fast(X), (X + 1) * 3)
    Own.forward = lambda self, x: x - 1  # type: ignore[method-assign]
    torch.testing.assert_close(fast(X), X - 1)
    assert fast.stats()["captures"] == 4


@pytest.fixture
def global_hook() -> Iterator[Callable[[], Any]]:
    handles: list[Any] = []

    def register() -> Any:
        handles.append(nn.modules.module.register_module_forward_hook(times_two))
        return handles[-1]

    yield register
    for handle in handles:
        handle.remove()


def test_global_hooks_are_noticed(global_hook: Callable[[], Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    fast = turbotx.optimize(model, backend="aten")
    before = fast(X)
    handle = global_hook()
    torch.testing.assert_close(fast(X), model(X))
    handle.remove()
    assert torch.equal(fast(X), before)
    assert fast.stats()["captures"] == 2


def test_hooks_added_and_removed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    fast = turbotx.optimize(model, backend="aten")
    before = fast(X)
    handles = [
        model[1].register_forward_hook(times_two),
        model.register_forward_pre_hook(times_two),
    ]
    torch.testing.assert_close(fast(X), model(X))
    for handle in handles:
        handle.remove()
    assert torch.equal(fast(X), before)
    assert fast.stats()["captures"] == 2


def test_closures_are_noticed() -> None:
    factor, table = 2.0, {"a": 1.0}

    def set_factor(value: float) -> None:
        nonlocal factor
        factor = value

    @turbotx.optimize(backend="aten")
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * factor + table["a"]

    torch.testing.assert_close(scaled(X), X * 2 + 1)
    set_factor(3.0)
    torch.testing.assert_close(scaled(X), X * 3 + 1)
    table["a"] = 5.0
    torch.testing.assert_close(scaled(X), X * 3 + 5)
    set_factor(2.0)
    table["a"] = 1.0
    torch.testing.assert_close(scaled(X), X * 2 + 1)
    assert scaled.stats()["captures"] == 3  # type: ignore[attr-defined]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def test_untied_weights_are_noticed() -> None:
    model = Tied().eval()
    fast = turbotx.optimize(model, backend="aten")
    fast(X)
    shared = nn.Parameter(torch.eye(4) * 2)
    model.a.weight = model.b.weight = shared
    torch.testing.assert_close(fast(X), X * 4)
    assert fast.stats()["captures"] == 1, "a weight that is still shared is only read anew"
    model.b.weight = nn.Parameter(torch.eye(4) * 3)
    torch.testing.assert_close(fast(X), X * 6)
    assert fast.stats()["captures"] == 2


class AsksTies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = 10 if self.a.weight is self.b.weight else len(list(self.parameters()))
        return self.b(self.a(x)) * own


def test_weights_that_become_tied_are_noticed_in_either_order() -> None:
    model = AsksTies().eval()
    fast = turbotx.optimize(model, backend="aten")
    apart = nn.Parameter(torch.eye(4) * 3)
    for shared, captures in ((None, 1), (model.a.weight, 2), (apart, 2), (model.a.weight, 2)):
        if shared is not None:
            model.b.weight = shared
        torch.testing.assert_close(fast(X), model(X))
        assert fast.stats()["captures"] == captures
    model.a.weight = model.b.weight = apart
    torch.testing.assert_close(fast(X), model(X))
    assert fast.stats()["captures"] == 2, "still one tensor"


def test_parameters_that_are_only_counted_are_noticed_when_tied() -> None:
    class Counts(AsksTies):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * len(list(self.parameters()))

    model = Counts().eval()
    fast = turbotx.optimize(model, backend="aten")
    torch.testing.assert_close(fast(X), X * 2)
    model.b.weight = model.a.weight
    torch.testing.assert_close(fast(X), X * 1)


def test_zero_has_a_sign_and_nan_is_itself() -> None:
    class Signed(nn.Module):
        zero, nothing = 0.0, float("nan")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.copysign(x, torch.tensor(self.zero)) + torch.nan_to_num(
                torch.tensor(self.nothing)
            )

    model = Signed().eval()
    fast = turbotx.optimize(model, backend="aten")
    fast(X)
    model.zero = -0.0
    torch.testing.assert_close(fast(X), model(X))
    assert fast.stats()["captures"] == 2
    model.nothing = float("nan")
    fast(X)
    assert fast.stats()["captures"] == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_part_in_training_mode_is_refused(when: str) -> None:
    model = Rich().eval()
    fast = turbotx.optimize(model, backend="aten")
    if when == "after":
        fast(X)
    model.drop.train()
    for _ in range(2):
        with pytest.raises(TrainingError, match="'drop' is in training mode"):
            fast(X)
    model.drop.eval()
    torch.testing.assert_close(fast(X), model(X))
    assert fast.stats()["captures"] == 1
