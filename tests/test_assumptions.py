"""Random modules and random sequences of calls and changes: eager beside turbotx after every step.

In: seeds; the same on every run. Out: no failure among 200 sequences, and that the fuzzer sees what
it is to see::

    make test PYTEST_ARGS="tests/test_assumptions.py -k 3"
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.assumption_results import is_rounding
from tests.assumption_weights import PIECES
from tests.assumptions import (
    PER_MODULE,
    Spec,
    Step,
    difference,
    make_spec,
    make_steps,
    minimize,
    run_sequences,
)
from turbotx.engine.engine import Engine

GROUPS = 10


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("group", range(GROUPS))
def test_sequences(group: int) -> None:
    backend = "auto" if group == 0 else "aten"  # builds take most of a group's time
    tally = run_sequences(group * PER_MODULE, PER_MODULE, backend)
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.sequences == PER_MODULE and sum(tally.refusals.values()) < tally.calls / 2


def test_every_piece_runs_and_every_change_is_one() -> None:
    for kind in set(PIECES):
        spec = Spec(((0, kind, 1),), 0)
        for name in kind.changes():
            model = spec.build()
            getattr(model.pieces["p0"], name)(1)


def test_rounding_is_told_from_what_is_wrong() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()).to(torch.bfloat16)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    right = model(x)
    assert is_rounding(model, (x,), {}, right, right + 0.02)
    assert not is_rounding(model, (x,), {}, right, right + 0.3)
    assert not is_rounding(model, (x,), {}, (right, 1), (right, 2))
    assert not is_rounding(torch.nn.Linear(8, 8), (x,), {}, right, right)


class _Steep(torch.nn.Module):
    """Its result is any number of -1 to 1 where x is about a third, by how x * 3 is rounded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh((x * 3 - 1) * 1000)


def test_rounding_is_told_where_eager_is_right_by_luck() -> None:
    x = torch.full((4, 8), 1 / 3).to(torch.bfloat16)
    right = _Steep()(x)
    true = _Steep()(x.double())
    lucky = true.to(torch.bfloat16)
    assert is_rounding(_Steep(), (x,), {}, lucky, right)
    assert is_rounding(_Steep(), (x,), {}, lucky, lucky - 1)
    assert not is_rounding(_Steep(), (x,), {}, lucky, lucky + 50)


def test_a_seed_says_all() -> None:
    assert make_steps(make_spec(3), 5) == make_steps(make_spec(3), 5)
    assert make_spec(3) != make_spec(4)


def test_what_is_not_checked_is_found_and_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "guards_state", False)
    flag, size = (next(p for p in PIECES if p.__name__ == name) for name in ("Flag", "Size"))
    spec = Spec(((0, size, 3), (1, flag, 4)), 0)
    steps = [Step("call", "batch", 3), Step(1, "change_scale", 4), Step("call", "data", 1)]
    small, fewer = minimize(spec, [Step("call", "data", 3), *steps], "values", "aten")
    assert [kind for _, kind, _ in small.pieces] == [flag]
    assert [step.change for step in fewer][-1] == "change_scale" and len(fewer) <= 2


def test_differences() -> None:
    x = torch.ones(2, 3)
    assert difference(x, x.clone(), 0) is None
    wrong = (x + 1, x.t().contiguous().t(), x.double(), x[:1], (x,), None)
    kinds = [found and found[0] for found in (difference(x, y, 0) for y in wrong)]
    assert kinds == ["values", "strides", "dtype", "shape", "structure", "values"]
