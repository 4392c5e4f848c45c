"""Printed Triton against float64: every length and hard kinds of rows, by the project's rule.

In: reductions of one tensor, captured once and run in Triton's interpreter at the tiles that each
length has on a GPU. Out: errors at most 1.5 x eager's own plus 2 ulp, for example::

    layer_norm of rows with mean 1e4 and std 1, of length 70000
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from torch.nn.functional import group_norm, layer_norm, rms_norm

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.compiled_functions import Compilation, compile_function
from tests.kernels.cpp.test_numerics import LENGTHS, rows_of
from tests.kernels.triton.triton_runner import TritonRunner
from tests.ops.operator_samples import excess
from turbotx.kernels.schedule import Schedule

Function: TypeAlias = Callable[[torch.Tensor], list[torch.Tensor]]


def along_rows(x: torch.Tensor) -> list[torch.Tensor]:
    size = (x.shape[-1],)
    return [layer_norm(x, size), x.var(-1, correction=0), x.std(-1, correction=0), x.mean(-1),
            group_norm(x[:, None], 1), x.softmax(-1), x.logsumexp(-1), rms_norm(x, size),
            x.argmax(-1)]  # fmt: skip


def down_columns(x: torch.Tensor) -> list[torch.Tensor]:
    """What is normal over the batch, as BatchNorm in training; x[place, feature]."""
    var, mean = torch.var_mean(x, 0, correction=0)
    return [var, mean, (x - mean) * torch.rsqrt(var + 1e-5), x.std(0, correction=0)]


def by_hand(x: torch.Tensor) -> list[torch.Tensor]:
    away = x - x.mean(-1, keepdim=True)
    return [away.pow(2).mean(-1), away / torch.sqrt(away.square().mean(-1, keepdim=True) + 1e-5)]


FUNCTIONS = (along_rows, down_columns, by_hand)


@pytest.fixture(scope="module")
def compiled() -> dict[Function, Compilation]:
    return {f: compile_function(f, torch.randn(3, 5)) for f in FUNCTIONS}


def check(
    function: Function, made: dict[Function, Compilation], x: torch.Tensor,
    schedule: Schedule | None = None,
) -> None:  # fmt: skip
    outputs = made[function].run((x,), TritonRunner(schedule))
    trues = function(x.double())
    for k, (ours, own, true) in enumerate(zip(outputs, function(x), trues, strict=True)):
        assert excess(ours, own, true) is None, f"output {k}: {excess(ours, own, true)}"


@pytest.mark.parametrize("kind", ["large mean", "hidden"])
@pytest.mark.parametrize("length", LENGTHS)
def test_along_rows(length: int, kind: str, compiled: dict[Function, Compilation]) -> None:
    check(along_rows, compiled, rows_of(kind, length).float())


@pytest.mark.parametrize("rows", [1, 2])
def test_a_norm_of_what_a_softmax_was_taken_of(rows: int) -> None:
    """Columns past the end are -inf after a softmax of a row in registers: no part of a mean."""

    def norms(x: torch.Tensor) -> list[torch.Tensor]:
        y = x + x
        weights = y.softmax(-1), x.softmax(-1)
        return [*weights, layer_norm(y, (3,)), (y + x).std(-1, correction=0), layer_norm(x, (3,))]

    x = torch.randn(4, 3)
    check(norms, {norms: compile_function(norms, x)}, x, Schedule(rows, 4))


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("tile", [1, 2])
def test_programs_that_take_several_tiles(
    rows: int, tile: int, compiled: dict[Function, Compilation]
) -> None:
    x = rows_of("hidden", 70)[:, None].expand(-1, 3, -1).reshape(-1, 70)[:rows].float().clone()
    shared = Schedule(tile, 128, programs=2)
    assert len(x) == rows and (rows < 4 or shared.count(rows) < -(-rows // tile))
    check(along_rows, compiled, x, shared)


def test_rows_without_any_element_to_see() -> None:
    """Only -inf, an infinity among others, NaN: as PyTorch's own."""
    x = torch.randn(4, 70)
    x[0], x[1, 3], x[2, 69], x[3, :69] = -torch.inf, torch.inf, torch.nan, -torch.inf

    def shares(x: torch.Tensor) -> list[torch.Tensor]:
        return [x.softmax(-1), x.log_softmax(-1), x.logsumexp(-1)]

    made = compile_function(shares, torch.randn(3, 5))
    for ours, own in zip(made.run((x,), TritonRunner()), shares(x), strict=True):
        torch.testing.assert_close(ours, own, equal_nan=True)


@pytest.mark.parametrize("length", [0, *LENGTHS[:-2]])
@pytest.mark.parametrize("function", [down_columns, by_hand])
def test_moments(function: Function, length: int, compiled: dict[Function, Compilation]) -> None:
    x = rows_of("large mean", length).float()
    x = x.T.contiguous() if function is down_columns else x
    check(function, compiled if length else {function: compile_function(function, x)}, x)
