"""Size rules and the matcher of them: what follows from an input's sizes, and what does not."""

from __future__ import annotations

import sympy

from turbotx.capture.guards import Guard
from turbotx.capture.shape_matcher import ShapeMatcher
from turbotx.capture.size_rules import find_size_rules
from turbotx.ir.expr import dim

BATCH, SEQ = dim("batch"), dim("seq")


def matcher(*sizes: tuple[sympy.Expr, ...], guards: tuple[Guard, ...] = ()) -> ShapeMatcher:
    names = [f"x{k}" for k in range(len(sizes))]
    return ShapeMatcher(find_size_rules(["batch", "seq"], names, sizes, guards))


def test_a_dim_follows_from_a_size_that_is_linear_in_it() -> None:
    found = matcher((BATCH, 2 * SEQ + 1))
    assert found.match([(3, 9)]) == (3, 4)
    assert found.match([(3, 8)]) is None
    assert found.explain([(3, 8)]) == "x0.shape[1] is 8, not 2*seq + 1"
    assert found.find_deciding([(3, 8)]) == {(0, 1)}


def test_a_dim_is_where_it_stands_alone_whatever_comes_first() -> None:
    found = matcher((BATCH * SEQ,), (BATCH, SEQ + 2), (SEQ,))
    assert found.match([(12,), (3, 6), (4,)]) == (3, 4)
    assert found.match([(13,), (3, 6), (4,)]) is None
    assert found.match([(12,), (3, 7), (4,)]) is None
    assert found.match([(0,), (3, 2), (0,)]) is None  # sizes of 0 are captured by themselves


def test_a_dim_that_nothing_says_is_named() -> None:
    found = matcher((BATCH, SEQ**2))
    assert found.match([(2, 9)]) is None
    assert found.explain([(2, 9)]) == "seq does not follow from the inputs' sizes"


def test_a_number_is_that_number() -> None:
    found = matcher((BATCH, sympy.Integer(4)), (SEQ,))
    assert found.match([(2, 4), (3,)]) == (2, 3)
    assert found.match([(2, 5), (3,)]) is None


def test_guards_say_what_does_not_hold() -> None:
    guards = (
        Guard(sympy.Le(SEQ, 16), "seq <= 16"),
        Guard(sympy.Or(sympy.Ne(BATCH, 3), sympy.Eq(SEQ, 5)), "batch != 3 or seq == 5"),
        Guard(sympy.Ge(6 / (SEQ - 7), -9), "the seventh divides by zero"),
    )
    found = matcher((BATCH, SEQ), guards=guards)
    assert found.match([(3, 5)]) == (3, 5)
    assert found.explain([(2, 17)]) == "seq <= 16 does not hold"
    assert found.explain([(3, 6)]) == "batch != 3 or seq == 5 does not hold"
    assert found.find_deciding([(3, 6)]) == {(0, 0), (0, 1)}
    assert found.match([(2, 7)]) is None
