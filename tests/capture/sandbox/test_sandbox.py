"""What a call leaves behind: as eager leaves it, at every call, and nothing of a trace."""

from __future__ import annotations

import collections
import functools
import weakref
from typing import Any, ClassVar

import pytest
import torch
from torch import distributions, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrize

import turbotx
from turbotx.capture.sandbox.leaks import find_leaks
from turbotx.errors import CaptureError, SaveError

X, Y = torch.randn(2, 3, 4), torch.randn(2, 5, 4)


def run(model, *calls):
    """The outputs of calls through turbotx, after each of which nothing of a trace is anywhere."""
    fast, found = turbotx.optimize(model), []
    for x in calls:
        found.append(fast(x))
        assert not find_leaks((model, x, found), "model")
    return found, fast.stats()["captures"]


class Keeping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Any] = {"deep": [[], {"a": []}]}
        self.queue: collections.deque[Any] = collections.deque(maxlen=2)
        self.register_buffer("places", torch.zeros(1), persistent=False)
        self.own = Plain()

    def forward(self, x):
        self.last, self.tree = x, {"half": (x / 2, [x.shape, 3])}
        self.kept["mean"] = x.mean()
        self.kept["deep"][1]["a"].append(x.sum())
        self.queue.append(x + 1)
        self.places = torch.arange(x.shape[1])
        self.own.seen["x"] = x * 3
        self.own.length = x.shape[1]
        return x + self.places[:, None]


class Plain:
    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}


def state(model) -> Any:
    names = ("last", "tree", "kept", "queue", "places")
    return {n: getattr(model, n) for n in names} | vars(model.own)


def test_every_call_leaves_what_eager_leaves() -> None:
    ours, theirs = Keeping().eval(), Keeping().eval()
    outputs, captures = run(ours, X, Y, Y)
    expected = [theirs(x) for x in (X, Y, Y)]
    torch.testing.assert_close(outputs, expected)
    assert captures == 1
    mine, own = state(ours), state(theirs)
    assert (mine.pop("queue"), own.pop("queue")) is not None
    for name in mine:
        torch.testing.assert_close(mine[name], own[name])
    torch.testing.assert_close(list(ours.queue), list(theirs.queue))
    torch.testing.assert_close(ours(Y), theirs(Y))
    assert ours.last is Y and type(ours.kept) is dict


def test_a_hook_that_collects_gets_a_tensor_a_call() -> None:
    model, kept = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), []
    model[0].register_forward_hook(lambda module, args, out: kept.append((module, out.sum(-1))))
    _, captures = run(model, X, Y, X)
    assert captures == 1 and [type(t) for _, t in kept] == [torch.Tensor] * 3
    torch.testing.assert_close(kept[1][1], model[0](Y).sum(-1))
    assert all(module is model[0] for module, _ in kept)


SHARED: dict[str, Any] = {}


class Global(nn.Module):
    table: ClassVar[dict[str, Any]] = {}

    def forward(self, x):
        SHARED["x"] = x.exp()
        self.table["y"] = x.sin()
        return remember(x) + 1


def remember(x, known: list[Any] = []):  # noqa: B006
    known.append(x * 2)
    return x


def test_globals_and_tables_of_a_class_and_defaults() -> None:
    run(Global().eval(), X, Y)
    torch.testing.assert_close(SHARED["x"], Y.exp())
    torch.testing.assert_close(Global.table["y"], Y.sin())
    torch.testing.assert_close(remember.__defaults__[0], [X * 2, Y * 2])


def test_closures_of_functions() -> None:
    store: dict[str, Any] = {}

    def function(x):
        store["x"] = x.exp()
        return x + 1

    run(function, X, Y)
    torch.testing.assert_close(store, {"x": Y.exp()})


@functools.lru_cache
def triangle(n: int) -> torch.Tensor:
    return torch.ones(n, n).tril()


@functools.lru_cache
def settings(name: str) -> dict[str, int]:
    return {name: 1}


class Cached(nn.Module):
    @staticmethod
    @functools.lru_cache(maxsize=4)
    def ramp(n, start=0):
        return torch.arange(start, n)

    def forward(self, x):
        assert settings("a") is settings("a")
        n = x.shape[1]
        return triangle(n) @ x + triangle(4)[0] + self.ramp(n, start=0)[:, None]


def test_caches_of_functions_hold_nothing_of_a_trace() -> None:
    triangle.cache_clear()
    kind = type(vars(Cached)["ramp"])
    outputs, captures = run(Cached().eval(), X, Y)
    torch.testing.assert_close(outputs, [Cached()(X), Cached()(Y)])
    assert captures == 1 and type(triangle(3)) is torch.Tensor
    assert type(vars(Cached)["ramp"]) is kind and hasattr(Cached.ramp, "cache_info")
    assert not find_leaks((triangle, Cached, settings))


@pytest.mark.parametrize(
    "key",
    [lambda n: n, lambda n: f"mask_{n}", lambda n: (n, "a"), lambda n: frozenset((n, 1))],
    ids=["number", "text", "tuple", "set"],
)
def test_a_mask_for_each_length(key) -> None:
    class ByLength(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept: dict[Any, Any] = {}

        def forward(self, x):
            n = x.shape[1]
            if key(n) not in self.kept:
                self.kept[key(n)] = torch.ones(n, n).tril()
            return self.kept[key(n)] @ x

    model = ByLength().eval()
    calls = X, torch.randn(7, 3, 4), X[:, :1]
    outputs, captures = run(model, *calls)
    torch.testing.assert_close(outputs, [ByLength()(x) for x in calls])
    # The second call finds the mask that the first made, and keeps none.
    assert set(model.kept) == {key(3), key(1)} and captures == 3
    fast = turbotx.optimize(model)
    torch.testing.assert_close([fast(x) for x in (*calls, *calls)], outputs * 2)
    assert fast.stats()["captures"] == 2


class Crossed(nn.Module):
    """Modules that are reached by lists, methods, partials, references and closures as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.all = [self.a, self.b]
        self.call, self.part = self.a.forward, functools.partial(self.scaled, scale=2)
        self.far = weakref.ref(self.b)
        self.inner = lambda x: self.b(x)
        self.b.weight = self.a.weight

    def scaled(self, x, scale):
        return self.far()(x) * scale

    def forward(self, x):
        for layer in self.all:
            x = layer(x)
        self.current = self.all[0]
        return self.part(self.call(x)) + self.inner(x)


def test_modules_that_are_reached_in_other_ways_are_the_users_own() -> None:
    model = Crossed().eval()
    fast = turbotx.optimize(model)
    torch.testing.assert_close(fast(X), model(X))
    assert model.current is model.a and model.part.func.__self__ is model
    with torch.no_grad():
        model.b.bias = nn.Parameter(torch.randn(4))
        model.a.bias.add_(1)
    torch.testing.assert_close(fast(Y), model(Y))


def test_after_a_failure_all_is_as_it_was() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept: dict[str, Any] = {}
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            self.kept["x"], self.last = self.linear(x), x
            SHARED["failed"] = x * 2
            return x[x > 0]

    model = Failing().eval()
    weight, before = model.linear.weight, set(vars(model))
    with pytest.raises(CaptureError):
        turbotx.optimize(model)(X)
    assert model.kept == {} and set(vars(model)) == before and "failed" not in SHARED
    assert model.linear.weight is weight and not find_leaks((model, X))


@pytest.mark.parametrize(
    ("leave", "message"),
    [
        (lambda m, x: setattr(m, "box", Box(x * 2)), r"object that contains a tensor in 'box'"),
        (lambda m, x: m.kept.pop("old"), r"removes or moves an entry of 'kept'"),
        (lambda m, x: m.order.insert(0, x), r"reads what 'order' holds and puts another in"),
        (lambda m, x: m.order.pop(), r"removes or moves an entry of 'order'"),
    ],
)
def test_what_a_program_cannot_leave_is_refused(leave, message) -> None:
    class Leaving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept, self.order = {"old": 1}, [1, 2]

        def forward(self, x):
            leave(self, x)
            return x + 1

    model = Leaving().eval()
    with pytest.raises(CaptureError, match=message):
        turbotx.optimize(model)(X)
    assert model.kept == {"old": 1} and model.order == [1, 2] and not find_leaks(model)


class Box:
    def __init__(self, tensor) -> None:
        self.tensor = tensor


def test_a_model_that_leaves_something_cannot_be_saved(tmp_path) -> None:
    fast = turbotx.optimize(Keeping().eval())
    fast(X)
    with pytest.raises(SaveError, match="leaves something in"):
        turbotx.save(fast, tmp_path / "model.ttx")


def test_the_finder_of_leaks_finds_them() -> None:
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(2))
    assert find_leaks([1, {"a": (2, fake)}], "x") == ["x[1]['a'][1]: FakeTensor"]

    def closed():
        return fake

    holder = nn.Linear(2, 2)
    holder.hidden = [closed]
    assert find_leaks(holder) and not find_leaks(nn.Linear(2, 2))
    cache = functools.lru_cache(lambda: fake)
    assert not find_leaks(functools.lru_cache(lambda: 1))
    cache()
    assert find_leaks(cache)


def test_a_hook_of_every_module_leaves_what_eager_leaves() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    fast, met, sums = turbotx.optimize(model, backend="aten"), list[str](), dict[str, Any]()

    def note(module, given, output):
        met.append(type(module).__name__)
        sums[type(module).__name__] = output.sum()

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        for x in (X, X, Y):
            met.clear()
            expected, found = model(x), list(met)
            kept = dict(sums)
            met.clear()
            torch.testing.assert_close(fast(x), expected)
            assert met == found == ["Linear", "ReLU", "Sequential"]
            torch.testing.assert_close(sums, kept)
    finally:
        handle.remove()


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def test_cached_parametrizations_hold_nothing_of_a_trace() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    parametrize.register_parametrization(model[0], "weight", Halved())
    fast = turbotx.optimize(model, backend="aten")
    with parametrize.cached():
        first = fast(X)  # computed in the program, and in PyTorch's cache afterwards
        assert not isinstance(model[0].weight, FakeTensor)
        torch.testing.assert_close(first, model(X))
        anew = turbotx.optimize(model, backend="aten")
        torch.testing.assert_close(anew(X), first)
    with torch.no_grad():
        model[0].parametrizations.weight.original.mul_(3)
    for optimized in (fast, anew):
        torch.testing.assert_close(optimized(X), model(X))


class Scored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.normal = distributions.MultivariateNormal(torch.zeros(4), 2 * torch.eye(4))
        self.kinds = distributions.Categorical(logits=torch.arange(4.0))

    def forward(self, x):
        return self.normal.log_prob(x) + self.normal.precision_matrix.sum(), self.kinds.probs * x


def test_what_a_distribution_keeps_is_a_tensor_of_a_call() -> None:
    model, like = Scored().eval(), Scored().eval()
    found, _ = run(model, X, Y, X)
    torch.testing.assert_close(found, [like(x) for x in (X, Y, X)])
    for name in ("normal", "kinds"):
        ours, theirs = vars(getattr(model, name)), vars(getattr(like, name))
        assert ours.keys() == theirs.keys()
        assert all(type(x) is type(theirs[key]) for key, x in ours.items())
    model.kinds = distributions.Categorical(logits=torch.zeros(4))
    torch.testing.assert_close(run(model, X)[0][0], model(X))
