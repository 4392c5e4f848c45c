"""What must cost no capture, what a forward sets itself, threads, how many captures are kept."""

from __future__ import annotations

import copy
import functools
import logging
import threading
import types
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import turbotx
from turbotx.errors import CaptureError, OptionsError

X = torch.linspace(-2, 3, 12).reshape(3, 4)
UNREAD = 1.0
optimize = functools.partial(turbotx.optimize, backend="aten")


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)
        self.scale, self.factors = 2.0, [1.0, 2.0]
        self.config = types.SimpleNamespace(gain=1.0)
        self.adapter: nn.Module | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.linear(x)) * self.scale * self.factors[-1] * self.config.gain
        return x if self.adapter is None else x + self.adapter(x)


def optimized() -> tuple[Scaled, Any]:
    model = Scaled().eval()
    return model, optimize(model)


def same_values(model: Scaled) -> None:
    model.scale, model.factors = 2.0, [1.0, 2.0]
    model.config = types.SimpleNamespace(gain=1.0)


def new_weight(model: Scaled) -> None:
    model.linear.weight = nn.Parameter(torch.eye(4))


def add_and_remove_a_hook(model: Scaled) -> None:
    model.linear.register_forward_hook(lambda *a: None).remove()


def set_global(model: Scaled) -> None:
    globals()["UNREAD"] += 1


HARMLESS = {
    "attribute nobody read": lambda m: setattr(m, "calls", 5),
    "evaluation mode again": lambda m: m.eval(),
    "no training": lambda m: m.train(False),
    "the same values": same_values,
    "weight replaced": new_weight,
    "weights loaded": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())),
    "weight in place": lambda m: m.linear.bias.data.zero_(),
    "hook added and removed": add_and_remove_a_hook,
    "a global nobody read": set_global,
    "gradients off": lambda m: m.requires_grad_(False),
    "backward hook": lambda m: m.linear.register_full_backward_hook(lambda *a: None),
}


def test_what_changes_nothing_costs_no_capture() -> None:
    model, fast = optimized()
    fast(X)
    for name, change in HARMLESS.items():
        for _ in range(2):
            change(model)
            torch.testing.assert_close(fast(X), model(X))
        assert fast.stats()["captures"] == 1, name


def test_the_old_state_finds_the_old_capture() -> None:
    model, fast = optimized()
    part = nn.Linear(4, 4)
    for _ in range(3):
        for scale in (2.0, 3.0):
            for adapter in (None, part):
                model.scale, model.adapter = scale, adapter
                torch.testing.assert_close(fast(X), model(X))
    assert fast.stats()["captures"] == 4


def test_a_change_serves_every_size() -> None:
    model, fast = optimized()
    for scale in (2.0, 3.0, 2.0):
        model.scale = scale
        for rows in (3, 1, 5):
            x = torch.randn(rows, 4)
            torch.testing.assert_close(fast(x), model(x))
    assert fast.stats()["captures"] == 2


def test_the_longest_unused_capture_goes(caplog: pytest.LogCaptureFixture) -> None:
    model = Scaled().eval()
    fast = optimize(model, max_variants=2)
    with caplog.at_level(logging.INFO, logger="turbotx"):
        for scale in (1.0, 2.0, 1.0, 3.0, 1.0):
            model.scale = scale
            torch.testing.assert_close(fast(X), model(X))
    assert fast.stats()["captures"] == 2
    assert sum("captured Scaled" in r.getMessage() for r in caplog.records) == 3
    assert any("max_variants=2" in r.getMessage() for r in caplog.records)
    assert any("scale was 1.0, is 2.0" in r.getMessage() for r in caplog.records)
    with pytest.raises(OptionsError, match="max_variants"):
        turbotx.optimize(model, max_variants=0)


def test_two_threads() -> None:
    model, fast = optimized()
    rights = {}
    for scale in (2.0, 3.0):
        model.scale = scale
        rights[scale] = fast(X)
    wrong: list[Any] = []
    stop = threading.Event()

    def call() -> None:
        while not stop.is_set():
            out = fast(X)
            if not any(torch.equal(out, right) for right in rights.values()):
                wrong.append(out)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(200):
        model.scale = 2.0 + i % 2
        model.factors = [1.0, 2.0]
        model.calls = i
        torch.equal(fast(X), rights[model.scale]) or wrong.append(i)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert fast.stats()["captures"] == 2


class Sets(nn.Module):
    """Sets an attribute in forward, in the way that is asked for."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls, self.kept, self.first = how, 0, None, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "counts":
            self.calls += 1
            return x * self.calls
        if self.how == "remembers":
            self.kept = x if self.kept is None else torch.cat((self.kept, x))
            return self.kept
        if self.how == "averages":
            self.kept = 0.5 * self.kept + x.mean()
            return x + self.kept
        if self.how == "first":
            if self.kept is None:
                self.kept = x.mean(0)
            return x - self.kept
        if self.how == "longest":
            if x.shape[0] > self.calls:
                self.calls = x.shape[0]
            return x * self.calls
        if self.how == "turns":
            self.first = not self.first
            return x * (2 if self.first else 3)
        if self.how == "keeps":
            self.kept = x * 2
        if self.how == "caches":
            if self.kept is None or self.kept.shape[0] < x.shape[0]:
                self.kept = torch.arange(x.shape[0]).unsqueeze(1)
            return x + self.kept[: x.shape[0]]
        if self.how == "the same":
            self.calls = 0
        if self.how == "flag":
            self.first = False
        return x + 1


def test_a_number_that_counts_the_calls_is_refused() -> None:
    model = Sets("counts").eval()
    with pytest.raises(CaptureError, match=r"forward reads 'calls' .*sets it to 1"):
        optimize(model)(X)
    assert model.calls == 0


def test_a_tensor_that_grows_with_every_call_is_refused() -> None:
    model = Sets("remembers").eval()
    fast = optimize(model)
    fast(X)
    with pytest.raises(CaptureError, match=r"forward reads 'kept' .*sets it to a torch.float32"):
        fast(X)


@pytest.mark.parametrize(
    "how, captures",
    [
        ("keeps", 1), ("flag", 1), ("averages", 1), ("first", 2), ("turns", 2), ("longest", 4),
        ("caches", 4), ("the same", 1),
    ],
)  # fmt: skip
def test_what_forward_sets_is_set_at_every_call(how: str, captures: int) -> None:
    ours, theirs = Sets(how).eval(), Sets(how).eval()
    if how == "averages":
        ours.kept, theirs.kept = torch.ones(()), torch.ones(())
    fast = optimize(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (3, 2, 6, 6, 3, 2):
            x = torch.randn(rows, 4)
            torch.testing.assert_close(fast(x), theirs(x))
            for name in ("calls", "kept", "first"):
                torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    assert fast.stats()["captures"] == captures


def test_captures_of_a_state_that_each_call_changes_come_to_an_end() -> None:
    class Alternates(nn.Module):
        word = "a"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.word = self.word + "a"
            return x * len(self.word)

    fast = optimize(Alternates().eval())
    for k in range(9):
        assert torch.equal(fast(X), X * (k + 2))
    with pytest.raises(CaptureError, match=r"was captured 8 times .* changes 'word'"):
        fast(X)


class Sealed:
    """Without a dict: what is set in it, a program does not set."""

    __slots__ = ("last",)


def test_what_is_set_where_no_program_sets_it_is_refused() -> None:
    class Leaves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sealed = Sealed()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.sealed.last = x.shape[0]
            return x + 1

    model = Leaves().eval()
    with pytest.raises(CaptureError, match="sets 'last' of a Sealed"):
        optimize(model)(X)
    assert not hasattr(model.sealed, "last")


def test_a_trace_leaves_the_classes_as_they_were() -> None:
    before = dict(vars(nn.Module))
    _, fast = optimized()
    fast(X)
    assert dict(vars(nn.Module)) == before
    assert "__getattribute__" not in vars(nn.Module)


class Levels:
    """A view that a property of a configuration makes anew at each read."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __getitem__(self, level: int) -> float:
        return float(self.config.first + level)


class Configuration:
    def __init__(self) -> None:
        self.first, self.name = 1, "a"

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(name)

    @property
    def levels(self) -> Levels:
        return Levels(self)


def test_an_object_that_a_property_makes_anew_counts_for_what_it_reads() -> None:
    class Leveled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = Configuration()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.config.levels[2]

    model = Leveled().eval()
    fast = optimize(model)
    assert torch.equal(fast(X), X * 3)
    model.config.name = "b"
    assert torch.equal(fast(X), X * 3) and fast.stats()["captures"] == 1
    model.config.first = 5
    assert torch.equal(fast(X), X * 7) and fast.stats()["captures"] == 2
