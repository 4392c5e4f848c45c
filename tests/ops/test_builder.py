"""Kernel builder: equal values are one statement, and what is known while lowering is folded."""

from __future__ import annotations

import pytest
import sympy
import torch

from turbotx import ir
from turbotx.ir.expr import dim
from turbotx.ir.primitives import PRIMITIVES, REDUCTIONS
from turbotx.ops.builder import Element, compute_dtype
from turbotx.ops.loop_nest import LoopNest
from turbotx.ops.scalarizer import Scalarizer

S = dim("seq")


@pytest.fixture
def b() -> Scalarizer:
    builder = Scalarizer(lambda node: True, LoopNest({}))
    builder.loops.make(S, "a0")
    return builder


def load(b: Scalarizer, dtype: torch.dtype = torch.float32) -> Element:
    return b.emit_load(ir.Access("x", ir.axis_symbol("a0")), dtype)


def ops(b: Scalarizer) -> list[str]:
    return [s.op for s in b.body if isinstance(s, ir.Compute)]


def test_equal_values_are_one(b: Scalarizer) -> None:
    x = load(b)
    assert (x * 2).name == (load(b) * 2.0).name
    assert ops(b) == ["mul"]


def test_halves_compute_as_float32(b: Scalarizer) -> None:
    assert compute_dtype(torch.bfloat16) is compute_dtype(torch.float16) is torch.float32
    assert load(b, torch.bfloat16).dtype is torch.float32
    assert compute_dtype(torch.float64) is torch.float64


def test_identities_vanish(b: Scalarizer) -> None:
    x = load(b)
    assert (x * 1).name == (1 * x).name == (x / 1).name == x.name
    assert b.cast(x, torch.bfloat16).name == x.name
    assert ops(b) == []


def test_constants_fold(b: Scalarizer) -> None:
    c = b.constant(3, torch.float32)
    assert (c * 2 + 1).value == 7.0
    assert b.where(b.constant(True, torch.bool), load(b), c).name == load(b).name
    hidden = b.call("and", b.constant(False, torch.bool), b.truth(load(b)))
    assert hidden.value is False


def test_folded_floats_round_at_each_step_as_eager_does(b: Scalarizer) -> None:
    root = b.call("sqrt", b.constant(0, torch.float32) + 0.1)
    assert root.value == (torch.zeros(()) + 0.1).sqrt().item() != 0.1**0.5


def test_positions_compare_while_lowering(b: Scalarizer) -> None:
    row = b.index(ir.axis_symbol("a0"))
    assert (row >= 0).value is True
    assert (row < b.index(S)).value is True
    assert (row >= b.index(S)).value is False
    assert (row < 1).value is None  # true at the first place only
    assert b.call("eq", row, row).value is True
    assert (row + 1 - row).value == 1


def test_division_of_integers_by_zero_is_left_to_the_kernel(b: Scalarizer) -> None:
    c = b.constant(1, torch.int32)
    assert b.call("floordiv", c, b.constant(0, torch.int32)).value is None


def test_comparisons_are_bool(b: Scalarizer) -> None:
    assert (load(b) > 0).dtype is torch.bool
    assert b.truth(load(b)).dtype is torch.bool
    assert b.cast(load(b), torch.bool).dtype is torch.bool


def test_infinity_is_not_cast_to_an_integer_while_lowering(b: Scalarizer) -> None:
    infinity = b.constant(float("inf"), torch.float32)
    assert b.cast(infinity, torch.int64).value is None


def test_splits_are_exact() -> None:
    loops = LoopNest({"a0": [sympy.Integer(4)]})
    index = loops.make(sympy.Integer(12), "a0")
    assert loops.axes == {"a0h": 3, "a0l": 4}
    high, low = loops.split(index, sympy.Integer(4))
    assert (str(high), str(low)) == ("@a0h", "@a0l")
    assert loops.bounds(index) == (0, 11)
    assert loops.bounds(ir.value_symbol("x")) == (None, None)


def test_an_index_that_runs_backwards_is_not_split_into_negative_loops() -> None:
    loops = LoopNest({})
    flipped = 2 * S - 1 - loops.make(2 * S, "a0")
    high, low = loops.split(flipped.expand(), S)
    dims = {"seq": 3, "@a0": 4}
    found = [int(e.xreplace({s: dims[s.name] for s in e.free_symbols})) for e in (high, low)]
    assert found == [(2 * 3 - 1 - 4) // 3, (2 * 3 - 1 - 4) % 3]


def test_no_division_is_left_of_an_index_that_runs_backwards() -> None:
    """C and Triton would round (-1 - col) / 2 up, Python rounds it down."""
    loops = LoopNest({})
    row, col = loops.make(S, "a0"), loops.make(sympy.Integer(2), "a1")
    high, low = loops.split((2 * S - 1 - 2 * row - col).expand(), sympy.Integer(2))
    assert (high, low) == (S - 1 - row, 1 - col)
    mixed = (2 * S + row - 3 * col).expand()  # below zero at some places of its last terms
    high, low = loops.split(mixed, sympy.Integer(2))
    for i, j in ((0, 1), (1, 1), (2, 0)):
        dims = {"seq": 3, "@a0": i, "@a1": j}
        found = [int(e.xreplace({s: dims[s.name] for s in e.free_symbols})) for e in (high, low)]
        assert found == list(divmod(6 + i - 3 * j, 2))


@pytest.mark.parametrize("row", PRIMITIVES.values(), ids=lambda row: row.name)
def test_every_primitive_spells_its_arguments(row: object) -> None:
    assert isinstance(row.cost, int) and row.cost >= 1  # type: ignore[attr-defined]
    for text in (row.cpp, row.triton):  # type: ignore[attr-defined]
        used = {k for k in "012" if f"{{{k}}}" in text}
        assert used == {k for k in "012" if int(k) < len(used)}


def test_reductions_are_what_they_say() -> None:
    x = torch.randn(3, 5, dtype=torch.float64) + 100
    mean, m2 = REDUCTIONS["welford"].meaning(x)
    torch.testing.assert_close(m2 / 5, x.var(-1, correction=0))
    torch.testing.assert_close(mean, x.mean(-1))
    largest, total = REDUCTIONS["softmax"].meaning(x)
    torch.testing.assert_close(largest + total.log(), x.logsumexp(-1))
