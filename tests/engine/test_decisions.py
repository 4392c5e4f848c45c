"""Branches on values of tensors: assumed, checked at every call, and answered rightly otherwise."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import turbotx
from turbotx.engine.optimize import engine_of
from turbotx.errors import CaptureError, DecisionWarning, EagerWarning, InputError

DOWN, UP = -torch.ones(2, 4), torch.ones(3, 4)


class Model(nn.Module):
    """A model of one function of itself and a tensor."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.function = nn.Linear(4, 4), function
        self.register_buffer("limit", torch.tensor(2.0))
        self.eval()

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def optimize(function: Callable[..., Any], **options: Any) -> tuple[Model, Any]:
    model = Model(function)
    return model, turbotx.optimize(model, backend="aten", **options)


@pytest.fixture(autouse=True)
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DecisionWarning)
        yield


def check(model: Model, fast: Any, *inputs: torch.Tensor) -> None:
    """Compare with eager, call by call, and forwards and backwards."""
    for x in (*inputs, *reversed(inputs)):
        with torch.no_grad():
            expected = model(x)
        torch.testing.assert_close(fast(x), expected)


def _branch(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.linear(x) * 2 if x.sum() > 0 else self.linear(x) - 1


def _item(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.sum().item() / x.shape[0] > 0.5 else x - 1


def _integer(self: Any, x: torch.Tensor) -> torch.Tensor:
    count = (x > 0).sum().item()
    return x[:, :2] if count == 2 * x.shape[0] else x if 3 < count < x.numel() else x + 1


def _loop(self: Any, x: torch.Tensor) -> torch.Tensor:
    for row in range(3):
        x = x * 2 if (x[..., row] > 0).all() else x - 1
    return x


def _while(self: Any, x: torch.Tensor) -> torch.Tensor:
    while not x.max() > 3:
        x = x + 2
    return x


def _buffer(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x * 2 if self.limit > x.abs().max() else x


def _functions(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = x + 1 if torch.equal(x, x.abs()) else x - 1
    x = x * 2 if torch.allclose(x, x.abs()) else x * 3
    return x + 5 if 2.0 in x else x


def _and(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x + 1 if x.shape[1] > 2 and x.any() and not (x < 0).any() else x - 1


def _float_and_back(self: Any, x: torch.Tensor) -> torch.Tensor:
    high, low = x.max().item(), x.min().item()
    return x / 2 if high - low < 1e-3 and high * 3 > low else x


@pytest.mark.parametrize(
    "function",
    [_branch, _item, _integer, _loop, _while, _buffer, _functions, _and, _float_and_back],
)
def test_both_outcomes_alternate(function: Any) -> None:
    model, fast = optimize(function)
    mixed = torch.tensor([[1.0, -1.0, 2.0, -2.0]])
    check(model, fast, UP, DOWN, mixed, UP[:1], DOWN[:1], torch.zeros(1, 4), 5 * UP)
    assert fast.stats()["eager_calls"] == 0


def test_the_first_calls_own_outcome_is_assumed() -> None:
    model, fast = optimize(_branch)
    check(model, fast, DOWN, DOWN[:1], 3 * DOWN)
    stats = fast.stats()
    assert (stats["captures"], stats["decided_otherwise"]) == (1, 0)


def test_another_outcome_is_captured_once_counted_and_said_once() -> None:
    model, fast = optimize(_branch)
    fast(UP)
    with pytest.warns(DecisionWarning, match=r"test_decisions.py:\d+: return self.linear.*False"):
        fast(DOWN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(model, fast, UP[:2], DOWN, UP[:2])
    stats = fast.stats()
    assert stats["captures"] == 2 and stats["decided_otherwise"] > 2


def test_an_assertion_that_fails_is_the_models_own() -> None:
    def function(self: Any, x: torch.Tensor) -> torch.Tensor:
        assert x.max().item() <= x.shape[1], f"too large for {x.shape[1]}"
        return x + 1

    model, fast = optimize(function)
    check(model, fast, UP, DOWN, torch.full((1, 4), 4.0))
    with pytest.warns(EagerWarning, match="too large"), pytest.raises(AssertionError):
        fast(5 * UP)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said
        with pytest.raises(AssertionError, match="too large for 4"):
            fast(5 * UP)
    check(model, fast, UP)
    assert fast.stats()["eager_calls"] == 2 and fast.stats()["captures"] == 1


def test_an_assertion_that_fails_at_the_first_call() -> None:
    def function(self: Any, x: torch.Tensor) -> torch.Tensor:
        torch._check(x.sum().item() > 0, lambda: "no sum")
        torch._assert((x < 9).all(), "large")
        return x + 1

    model, fast = optimize(function)
    with pytest.warns(EagerWarning, match=r"torch._check"), pytest.raises(RuntimeError):
        fast(DOWN)
    with pytest.warns(EagerWarning, match=r"torch._assert"), pytest.raises(AssertionError):
        fast(10 * UP)
    check(model, fast, UP)
    assert fast.stats()["captures"] == 1


def test_a_way_that_cannot_be_captured_runs_in_pytorch() -> None:
    def function(self: Any, x: torch.Tensor) -> torch.Tensor:
        if (x > 0).any():
            return x[x > 0]
        return x

    model, fast = optimize(function)
    check(model, fast, DOWN)
    with pytest.warns(EagerWarning, match=r"if \(x > 0\).any\(\).*cannot be captured"):
        fast(UP)
    check(model, fast, UP, DOWN)
    assert fast.stats()["captures"] == 1


def test_a_number_that_is_not_finite_is_left_to_the_model() -> None:
    def function(self: Any, x: torch.Tensor) -> torch.Tensor:
        high = x.max().item()
        return x + 1 if high != high else x * 2 if high - high == 0 else x

    model, fast = optimize(function)
    check(model, fast, UP)
    with pytest.warns(EagerWarning, match="infinite or NaN"):
        fast(UP * float("nan"))
    for x in (UP * float("nan"), UP * float("inf"), UP):
        torch.testing.assert_close(fast(x), model(x), equal_nan=True)


def test_nested_modules_and_hooks() -> None:
    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.clamp(max=0.1) if (output > 0.1).any() else output

    def function(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + 1 if torch.isfinite(x).all() else torch.nan_to_num(x)

    model, fast = optimize(function)
    model.linear.register_forward_hook(hook)
    broken = UP.clone()
    broken[0, 0] = float("nan")
    check(model, fast, UP, 9 * DOWN, broken, UP)
    assert fast.stats()["eager_calls"] == 0


def test_what_a_call_leaves_behind_is_left_once() -> None:
    seen: list[torch.Tensor] = []

    def function(self: Any, x: torch.Tensor) -> torch.Tensor:
        seen.append(x + 1)
        assert x.max() < 5
        return x * 2 if x.sum() > 0 else x

    _, fast = optimize(function)
    for x in (UP, DOWN, UP):
        fast(x)
    assert [float(x[0, 0]) for x in seen] == [2.0, 0.0, 2.0]


def test_a_step_with_no_end_is_refused_by_name() -> None:
    def function(self: Any, x: torch.Tensor) -> torch.Tensor:
        for _ in range(200):
            if x.max() > 0:
                x = x + 1
            if x.max() > 1:
                x = x + 2
            if x.max() > 2:
                x = x + 3
        return x

    _, fast = optimize(function)
    with pytest.raises(CaptureError, match="branches on values of tensors more than 128 times"):
        fast(UP)


def test_captures_for_other_outcomes_are_bounded() -> None:
    def function(self: Any, x: torch.Tensor) -> torch.Tensor:
        for k in range(4):
            x = x + (1 if (x[0, k] > 0).all() else 2)
        return x

    model, fast = optimize(function)
    inputs = [-9 + 18.0 * torch.tensor([[n >> k & 1 for k in range(4)]]) for n in range(16)]
    with pytest.warns(EagerWarning, match="for other outcomes"):
        check(model, fast, *inputs)
    assert fast.stats()["captures"] <= 9


def test_random_draws_beside_decisions_are_refused() -> None:
    def function(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.rand_like(x)
        return x if x.sum() > 0 else -x

    _, fast = optimize(function)
    with pytest.raises(CaptureError, match="draws random numbers and branches on a value"):
        fast(UP)


@pytest.mark.parametrize("size", ["x[: count]", "torch.zeros(count)", "int(x[0, 0]) + x"])
def test_sizes_and_numbers_by_values_stay_refused(size: str) -> None:
    def function(self: Any, x: torch.Tensor) -> Any:
        count = (x[:, 0] > 0).sum().item()
        assert count >= 0
        return eval(size, {"x": x, "count": count, "torch": torch})

    _, fast = optimize(function)
    with pytest.raises(CaptureError, match=r"depends on values|number that a tensor holds"):
        fast(UP)


def test_threads_that_decide_otherwise() -> None:
    model, fast = optimize(_loop)
    wrong = []

    def run(sign: int) -> None:
        for n in range(1, 15):
            x = torch.full((1 + n % 3, 4), float(sign * n))
            if not torch.equal(fast(x), model(x)):
                wrong.append(x)

    threads = [threading.Thread(target=run, args=(sign,)) for sign in (1, -1, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_such_decisions_nothing_is_looked_at() -> None:
    _, fast = optimize(lambda self, x: self.linear(x) if x.shape[0] > 1 else x)
    fast(UP)
    ((_, variant),) = engine_of(fast).keyed_variants()
    assert not variant.needs_post_run and len(variant.compiled.assembly.returned) == 1


@pytest.mark.parametrize("both", [True, False])
def test_a_saved_model_decides_or_refuses_by_name(tmp_path: Path, both: bool) -> None:
    model = Model(_branch)
    fast = turbotx.optimize(model)
    fast(UP)
    if both:
        fast(DOWN)
    turbotx.save(fast, tmp_path / "model.ttx")
    loaded = turbotx.load(tmp_path / "model.ttx")
    for x in (UP, UP[:1]):
        torch.testing.assert_close(loaded(x), fast(x))
    if both:
        for x in (DOWN, UP, DOWN[:1], DOWN):
            torch.testing.assert_close(loaded(x), fast(x))
    else:
        with pytest.raises(InputError, match=r"test_decisions.py:\d+.* came out False.*no saved"):
            loaded(DOWN)
