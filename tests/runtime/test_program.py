"""Programs: re-planned for each shape, checked plans, bounded memory of shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import turbotx
import turbotx.runtime.program
from tests.models import small_model, token_inputs
from turbotx.engine.optimize import engine_of
from turbotx.memory.planner import check_plan

PLANNERS = ("symbolic", "chunked", "greedy")


@pytest.mark.parametrize("planner", PLANNERS)
def test_every_planner_serves_every_shape(planner: str) -> None:
    model = small_model("bert", layers=1)
    fast = turbotx.optimize(model, planner=planner)
    for batch, seq in ((1, 1), (3, 40), (2, 7), (1, 300), (3, 40)):
        inputs = token_inputs(batch, seq)
        with torch.no_grad():
            torch.testing.assert_close(fast(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-5)
    (compiled,) = engine_of(fast).variants()
    program = compiled.program
    for dims in ((1, 1, 1), (3, 40, 3), (16, 512, 16)):
        plan = program.plan(dims)
        check_plan(plan)
        assert plan.peak_nbytes >= plan.lower_bound_nbytes


def test_the_symbolic_plan_meets_the_lower_bound() -> None:
    fast = turbotx.optimize(small_model("bert", layers=1))
    fast(**token_inputs(2, 9))
    (compiled,) = engine_of(fast).variants()
    for batch in (1, 3, 20):
        for seq in (1, 10, 128, 511):
            plan = compiled.program.plan((batch, seq, batch))
            assert plan.peak_nbytes <= 1.01 * plan.lower_bound_nbytes


def test_planned_buffers_that_overlap_in_time_do_not_in_space() -> None:
    fast = turbotx.optimize(small_model("gpt2", layers=1))
    fast(**token_inputs(2, 9))
    (compiled,) = engine_of(fast).variants()
    program = compiled.program
    binding = program.bind((2, 33, 2)[: len(program.dims)])
    lifetimes = dict(zip(program.liveness.names, program.liveness.lifetimes, strict=True))
    offsets = binding.offset_of
    plan = program.plan(binding.dims)
    sizes = {p.buffer.name: p.buffer.nbytes for p in plan.placements}
    for a in lifetimes:
        for b in lifetimes:
            if a < b and lifetimes[a].overlaps(lifetimes[b]):
                assert offsets[a] + sizes[a] <= offsets[b] or offsets[b] + sizes[b] <= offsets[a]


def test_shapes_are_forgotten_in_order() -> None:
    fast = turbotx.optimize(small_model("bert", layers=1), max_shapes=2)
    for seq in (3, 4, 5, 3):
        fast(**token_inputs(1, seq))
    (compiled,) = engine_of(fast).variants()
    assert compiled.program.plans == 4
    fast(**token_inputs(1, 3))
    assert compiled.program.plans == 4


def test_a_shape_in_use_is_kept_while_others_come_and_go() -> None:
    fast = turbotx.optimize(small_model("bert", layers=1), max_shapes=2)
    for seq in (3, 4, 3, 5, 3, 6, 3):
        fast(**token_inputs(1, seq))
    assert fast.stats()["plans"] == 4  # of four shapes, one each


def test_a_shape_seen_again_is_not_planned_again() -> None:
    fast = turbotx.optimize(small_model("bert", layers=1))
    for seq in (3, 4, 3, 4):
        fast(**token_inputs(2, seq))
    assert fast.stats()["plans"] == 2


def test_poisoned_runs_fill_what_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = turbotx.optimize(small_model("bert", layers=1))
    inputs = token_inputs(2, 9)
    clean = fast(**inputs)[0]
    filled: list[int] = []
    poison = turbotx.runtime.program.poison

    def record(memory: torch.Tensor) -> None:
        filled.append(memory.numel())
        poison(memory)

    monkeypatch.setenv("TURBOTX_POISON", "1")
    monkeypatch.setattr("turbotx.runtime.program.poison", record)
    torch.testing.assert_close(fast(**inputs)[0], clean, rtol=0, atol=0)
    (compiled,) = engine_of(fast).variants()
    assert len(filled) == len(compiled.program.liveness.names)
    assert all(filled)


@pytest.mark.parametrize("backend", ["aten", "auto"])
def test_constants_and_parameters_that_lie_otherwise(backend: str) -> None:
    places, table = torch.tensor([[0, 1], [1, 0], [0, 0]]).t(), torch.randn(5, 12)[:, ::2]

    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(6, 5).t())
            self.register_buffer("shift", torch.randn(1, 6).expand(5, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.scale + self.shift)[places] * table

    model, x = Strided().eval(), torch.randn(2, 5, 6)
    torch.testing.assert_close(turbotx.optimize(model, backend=backend)(x), model(x))
