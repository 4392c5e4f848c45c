"""Loop nests: what is known of an index is derived once a kernel."""

from __future__ import annotations

from collections import Counter

import sympy

from turbotx.ir.expr import ZERO, dim
from turbotx.ops.loop_nest import LoopNest

SEQ = dim("seq")


def test_bounds_of_an_index_are_derived_once(monkeypatch) -> None:
    derived: Counter[str] = Counter()
    derive = LoopNest.find_bounds

    def count(self, value, axes):
        derived[str(value)] += 1
        return derive(self, value, axes)

    monkeypatch.setattr(LoopNest, "find_bounds", count)
    loops = LoopNest({})
    row = loops.make(SEQ, "row")
    for _ in range(3):
        column = loops.make(sympy.Integer(32), "column")
        assert loops.bounds(32 * row + column) == (ZERO, 32 * SEQ - 1)
        assert loops.split(32 * row + column, sympy.Integer(32)) == (row, column)
        assert loops.bounds(-row) == (1 - SEQ, ZERO)
    assert max(derived.values()) == 1


def test_an_axis_that_is_no_loop_has_the_extent_that_is_given() -> None:
    loops = LoopNest({})
    place = sympy.Symbol("@within", integer=True)
    assert loops.bounds(place, {"within": SEQ})[1] == SEQ - 1
    assert loops.bounds(place, {"within": 2 * SEQ})[1] == 2 * SEQ - 1
