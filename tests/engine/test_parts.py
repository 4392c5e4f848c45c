"""Which methods of a class call its submodules: found in their source, and nothing else is."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import turbotx
from tests.engine.test_drop_in import Net, Odd
from turbotx.engine.parts import calls_of_parts, path_to_model
from turbotx.errors import EagerWarning, TurbotxError


def announced(function):
    return function


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.size = nn.Identity(), nn.Identity(), 3

    def forward(self, x):
        return self.second(self.first(x))

    def encode(self, x):
        return self.first.encode(x)

    @torch.no_grad()
    def decode(self, *args):
        return [self.second(*args) for _ in range(self.size)]

    def run(self, x):
        return self.first.forward(x) + self(x)

    def set_adapter(self, name):
        self.first.set_adapter(name)

    def weights(self):
        return self.first.weight, self.size(3)

    @property
    def device(self):
        return self.first(0)


class Child(Pair):
    def run(self, x):
        return self(x)


def test_calls_and_calls_passed_on() -> None:
    names = ("first", "second")
    encode, decode = {"first": True}, {"second": False}
    assert calls_of_parts(Pair, names) == {
        "encode": encode, "decode": decode, "run": {"first": False},
    }  # fmt: skip
    assert calls_of_parts(Child, names) == {"encode": encode, "decode": decode}


def test_nothing_where_there_are_no_parts() -> None:
    assert calls_of_parts(Pair, ()) == {}
    assert calls_of_parts(nn.Linear, ("weight",)) == {}
    space: dict = {}
    exec(
        "class Typed(Base):\n    def encode(self, x):\n        return self.a(x)",
        {"Base": nn.Module},
        space,
    )
    assert calls_of_parts(space["Typed"], ("a",)) == {}


def test_the_model_in_a_wrapper() -> None:
    two = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert path_to_model(two) == ()
    assert path_to_model(nn.Linear(2, 2)) == ()
    assert path_to_model(nn.Sequential(nn.ReLU())) == ()
    holder = nn.Module()
    holder.model, holder.pool, holder.nothing = two, nn.ReLU(), None
    assert path_to_model(nn.Sequential(holder, nn.Tanh())) == ("0", "model")
    holder.register_buffer("scale", torch.ones(1))
    assert path_to_model(nn.Sequential(holder, nn.Tanh())) == ("0",)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.kept = nn.Linear(6, 8), {"scale": 2.0}

    def forward(self, x):
        return torch.relu(self.up(x))

    def generate(self, x):
        return self(x) * self.kept["scale"]

    def encoder_size(self):
        return self.up.in_features


class HandingOn(nn.Module):
    """As the tuners of PEFT: what it does not have, the model inside it may have."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)


def test_methods_that_are_handed_on_go_through() -> None:
    model, x = HandingOn(HandingOn(Inner())).eval(), torch.randn(3, 6)
    fast = turbotx.optimize(model)
    for _ in range(2):
        torch.testing.assert_close(fast.generate(x), model.generate(x))
    assert fast.stats()["captures"] == 1 and fast.stats()["eager_calls"] == 0
    assert fast.encoder_size() == 6 and fast.kept is model.model.model.kept
    model.model.model = Inner().eval()  # replaced: the twin of the old one is not asked
    torch.testing.assert_close(fast.generate(x), model.generate(x))
    with torch.no_grad():
        model.model.model.up.weight.mul_(2)
    torch.testing.assert_close(fast.generate(x), model.generate(x))
    model.model.model = turbotx.optimize(model.model.model)
    torch.testing.assert_close(fast.generate(x), model.generate(x))


class Around(HandingOn):
    """As the models of PEFT around its tuners."""

    def generate(self, x):
        self.asked = len(x)
        return self.model.generate(x)

    def generate_each(self, x):
        yield self.model.generate_each(x)


def test_a_submodule_that_a_method_passes_its_call_on_to_goes_through() -> None:
    model, x = Around(HandingOn(Inner())).eval(), torch.randn(3, 6)
    fast, right = turbotx.optimize(model), model.generate(x)
    del model.asked
    torch.testing.assert_close(fast.generate(x), right)
    assert fast.stats()["captures"] == 1 and fast.stats()["eager_calls"] == 0
    assert model.asked == 3 and fast.model is model.model
    model.model = HandingOn(Inner()).eval()
    torch.testing.assert_close(fast.generate(x), model.generate(x))
    with pytest.warns(EagerWarning, match="runs self.model by itself, in PyTorch"):
        fast.generate_each(x)  # runs later


class Loop:
    """What a library runs a model in: an object that holds it, in a thread."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.found = model, []

    def work(self, x):
        try:
            self.found.append(self.model(x, scale=Odd()))
        except TurbotxError as error:
            self.found.append(error)

    def work_apart(self, x):
        thread = threading.Thread(target=self.work, args=(x,))
        thread.start()
        thread.join()


def test_a_refused_call_runs_in_pytorch_where_the_models_package_makes_it_in_a_thread() -> None:
    model, x = Net().eval(), torch.randn(3, 6)
    loop = Loop(turbotx.optimize(model))
    with pytest.warns(EagerWarning, match=r"Net runs in PyTorch, not turbotx: argument 'scale'"):
        loop.work_apart(x)
    loop.work(x)
    assert torch.equal(loop.found[0], model(x, scale=Odd()))
    assert isinstance(loop.found[1], TurbotxError), "who calls it directly is told"
