"""What `optimize` returns stands where the model stood: its class, its state, its methods.

In: small modules and classes. Out: the same answers as the model's own, from turbotx wherever the
model is called, and a word where it is not.
"""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

import turbotx
from turbotx.engine.drop_in import OptimizedModule, original_of
from turbotx.engine.optimize import engine_of
from turbotx.errors import CaptureError, EagerWarning, InputError, OptionsError, TrainingError

X = torch.randn(3, 6)


class Net(nn.Module):
    """Doc."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.register_buffer("stats", torch.tensor(2.0))
        self.name = "net"

    def forward(self, x, scale: float = 1.0):
        return self.down(torch.relu(self.up(x))) * self.stats * scale

    def twice(self, x):
        return self(self.forward(x))

    def encode(self, x):
        return self.up(x)

    def branching(self, x):
        return self(x, scale=Odd())


class Odd:
    """An argument that cannot be taken apart."""

    def __init__(self) -> None:
        self.steps = iter([1])

    def __rmul__(self, other):
        return other * 3


class Branch(nn.Module):
    def forward(self, x):
        return x[: int(x.sum() > 0)]

    def score(self, x):
        return self(x).sum(-1)


def net() -> Net:
    return Net().eval()


def close(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_it_is_an_instance_that_shares_its_state_both_ways() -> None:
    model = net()
    fast = turbotx.optimize(model)
    assert isinstance(fast, Net)
    assert isinstance(fast, OptimizedModule)
    assert type(fast).__name__ == "Net"
    assert type(fast).__doc__ == "Doc."
    assert type(model) is Net
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)
    fast.name, model.other = "renamed", 3
    assert (model.name, fast.other) == ("renamed", 3)
    fast.extra = nn.Linear(2, 2)
    assert model.extra is fast.extra
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in model.named_modules()]
    del model.extra
    assert not hasattr(fast, "extra")
    assert fast.eval() is fast
    assert repr(fast).startswith("turbotx.optimize(Net(")
    assert original_of(fast) is model


def test_the_models_own_names_stay() -> None:
    model = net()
    fast = turbotx.optimize(model)
    assert fast.stats is model.stats
    close(fast(X), model(X))
    assert engine_of(fast).stats()["captures"] == 1


@torch.no_grad()
def test_methods_that_call_the_model_go_through() -> None:
    model = net()
    fast = turbotx.optimize(model)
    close(fast.twice(X), model.twice(X))
    close(fast.forward(X), model(X))
    stats = engine_of(fast).stats()
    assert stats | {"captures": 1, "eager_calls": 0} == stats


@torch.no_grad()
def test_methods_that_call_parts_say_so_once() -> None:
    model = net()
    fast = turbotx.optimize(model)
    with pytest.warns(EagerWarning, match=r"Net\.encode runs self\.up by itself"):
        close(fast.encode(X), model.encode(X))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.encode(X)
        model.encode(X)
        model.up = turbotx.optimize(model.up)
        close(fast.encode(X), original_of(model.up)(X))
    assert engine_of(fast).stats()["eager_calls"] == 2


@torch.no_grad()
def test_a_refused_call_raises_for_its_caller_and_not_for_the_models_methods() -> None:
    fast = turbotx.optimize(Branch())
    fast.eval()
    for x in (X.abs(), -X.abs()):
        with pytest.raises(CaptureError, match="x\\.sum"):
            fast(x)
    with pytest.warns(EagerWarning, match="runs in PyTorch, not turbotx: cannot capture Branch"):
        assert torch.equal(fast.score(X.abs()), (X.abs() * 2).sum(-1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fast.score(-X.abs()), (-X.abs() - 1).sum(-1))
    assert fast.stats()["eager_calls"] == 2


@torch.no_grad()
def test_a_call_that_was_refused_is_not_traced_again_for_a_method(monkeypatch) -> None:
    fast = turbotx.optimize(Branch())
    fast.eval()
    with pytest.warns(EagerWarning):
        fast.score(X)
    monkeypatch.setattr(engine_of(fast), "capture", None)
    fast.score(X)
    with pytest.raises(TypeError):
        fast(X)


@torch.no_grad()
def test_arguments_and_training_mode_are_reasons_too() -> None:
    model = net()
    fast = turbotx.optimize(model)
    with pytest.raises(InputError, match="steps"):
        fast(X, scale=Odd())
    with pytest.warns(EagerWarning, match="steps"):
        close(fast.branching(X), model(X) * 3)
    fast.train()
    with pytest.raises(TrainingError):
        fast(X)
    with pytest.warns(EagerWarning, match="training mode"):
        close(fast.twice(X), model.twice(X))


@torch.no_grad()
def test_hooks_of_the_model_run_around_the_program() -> None:
    model = net()
    fast = turbotx.optimize(model)
    before = fast(X)
    seen = []
    handle = fast.register_forward_hook(lambda module, args, out: seen.append(out) or -out)
    pre = model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    close(fast(X), model(X))
    assert [type(t) for t in seen] == [torch.Tensor] * 2
    assert engine_of(fast).stats()["captures"] == 1
    handle.remove()
    pre.remove()
    close(fast(X), before)
    assert len(seen) == 2


@torch.no_grad()
def test_a_forward_that_was_set_on_the_object_is_the_one_that_runs() -> None:
    model = net()
    fast = turbotx.optimize(model)
    inner = fast.forward
    fast.forward = lambda x: inner(x) + 1
    close(fast(X), Net.forward(model, X) + 1)
    with pytest.warns(EagerWarning, match="forward was replaced on the object"):
        close(fast.forward(X), Net.forward(model, X) + 1)


@torch.no_grad()
def test_a_class_with_a_call_of_its_own() -> None:
    class Doubling(Net):
        def __call__(self, x):
            return 2 * super().__call__(x)

    model = Doubling().eval()
    fast = turbotx.optimize(model)
    close(fast(X), model(X))
    close(fast.forward(X), model.forward(X))


@pytest.mark.parametrize("in_place", [False, True])
@torch.no_grad()
def test_copies_files_and_moves(in_place: bool) -> None:
    model = net()
    right = model(X)
    fast = turbotx.optimize(model, in_place=in_place)
    fast(X)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for other in (
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(file, weights_only=False),
        copy.deepcopy(nn.Sequential(fast))[0],
    ):
        assert isinstance(other, (Net, OptimizedModule))
        assert other.up is not fast.up
        close(other(X), right)
        other.up.weight.zero_()
        close(other(X), Net.forward(original_of(other), X))
    shallow = copy.copy(fast)
    assert shallow.up is fast.up
    shallow.name = "other"
    assert fast.name == "net"
    close(fast(X), right)
    fast.load_state_dict(Net().state_dict())
    close(fast(X), Net.forward(original_of(fast), X))
    assert fast.to(torch.bfloat16) is fast
    assert fast(X.bfloat16()).dtype is torch.bfloat16


def test_in_place() -> None:
    model = net()
    holder = nn.Sequential(model, nn.ReLU())
    with torch.no_grad():
        right = holder(X)
        assert turbotx.optimize(model, in_place=True) is model
        close(holder(X), right)
        assert engine_of(model).stats()["captures"] == 1
        close(model.twice(X), Net.forward(original_of(model), Net.forward(original_of(model), X)))
        turbotx.optimize(model, in_place=True, planner="greedy")
        close(holder(X), right)
    assert isinstance(model, Net)
    assert engine_of(model).options.planner == "greedy"
    for target in (Net, torch.relu):
        with pytest.raises(OptionsError, match="in_place=True"):
            turbotx.optimize(target, in_place=True)


Decorated = turbotx.optimize(Net)


@turbotx.optimize
class Marked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(x)

    def twice(self, x):
        return self(self(x))


class Below(Marked):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("made", [Decorated, Marked, Below])
@torch.no_grad()
def test_instances_of_decorated_classes(made) -> None:
    model = made().eval()
    right = model(X)
    assert engine_of(model).stats()["captures"] == 1
    close(model.forward(X), right)
    close(model.twice(X), model(model(X)))
    close(right, original_of(model)(X))
    for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert type(other).__name__ == made.__name__
        assert engine_of(other) is not engine_of(model)
        close(other(X), right)
    again = turbotx.optimize(model, planner="greedy")
    close(again(X), right)
    assert engine_of(again).options.planner == "greedy"


def test_the_engine_goes_with_the_object() -> None:
    fast = turbotx.optimize(net())
    engine = weakref.ref(engine_of(fast))
    gc.disable()
    try:
        del fast
        assert engine() is None
    finally:
        gc.enable()


def test_no_registry_of_subclasses_sees_the_class() -> None:
    known: list[str] = []

    class Registered(nn.Module):
        def __init_subclass__(cls, *, key: str, **kwargs):
            super().__init_subclass__(**kwargs)
            known.append(key)

    class One(Registered, key="one"):
        def forward(self, x):
            return x + 1

    assert torch.equal(turbotx.optimize(One().eval())(X), X + 1)
    made = turbotx.optimize(One)

    class Two(made, key="two"):
        pass

    assert torch.equal(Two().eval()(X), X + 1)
    assert known == ["one", "two"]


def test_assigning_over_a_property_that_gives_a_submodule() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = net()

        @property
        def inner(self):
            return self.model

        def forward(self, x):
            return self.model.forward(x)

    holder = Holder().eval()
    with torch.no_grad():
        right = holder(X)
        holder.inner = turbotx.optimize(holder.inner)
        assert isinstance(holder.inner, OptimizedModule)
        close(holder(X), right)
    assert engine_of(holder.inner).stats()["captures"] == 1


def test_torchscript_is_refused_by_name() -> None:
    with pytest.raises(OptionsError, match="TorchScript"):
        turbotx.optimize(torch.jit.trace(net(), X))


class Features(dict):
    """A container that pytree does not know."""


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.calls = net(), 0

    def forward(self, features):
        self.calls += 1
        features["out"] = self.model(features["x"])
        return features

    def encode(self, x):
        return self(Features(x=x))["out"]


@torch.no_grad()
def test_a_wrapper_whose_call_is_refused_runs_around_its_model() -> None:
    wrapper = nn.Sequential(Wrapper()).eval()
    fast = turbotx.optimize(wrapper)
    features = Features(x=X)
    assert fast(features) is features
    close(features["out"], wrapper[0].model(X))
    assert fast.stats()["captures"] == 1
    assert wrapper[0].calls == 1
    assert type(wrapper[0].model) is Net
    inner = turbotx.optimize(wrapper[0])
    close(inner.encode(X), features["out"])
    assert inner.stats() | {"captures": 1, "eager_calls": 0} == inner.stats()
    wrapper.train()
    with pytest.raises(TrainingError):
        fast(Features(x=X))
