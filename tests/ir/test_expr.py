"""Sizes: proofs about symbolic sizes never claim a falsehood, checked against brute force."""

from __future__ import annotations

import itertools
import re

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from turbotx.ir.expr import (
    ONE,
    ZERO,
    cancel_rounding,
    compile_evaluator,
    dim,
    divide,
    evaluate,
    is_nonnegative,
    product,
    to_c,
    to_python,
)

B, S, H = dim("batch"), dim("seq"), dim("heads")
small = st.integers(-4, 6)


@st.composite
def polynomials(draw: st.DrawFn) -> sympy.Expr:
    terms = draw(st.lists(st.tuples(small, st.sampled_from([1, B, S, H, B * S, S * S, B * S * H])),
                          min_size=1, max_size=4))  # fmt: skip
    return sympy.expand(sum((c * t for c, t in terms), ZERO))


def everywhere(value: sympy.Expr) -> list[int]:
    names = ("batch", "seq", "heads")
    return [
        evaluate(value, dict(zip(names, v, strict=True)))
        for v in itertools.product((1, 2, 3, 5), repeat=3)
    ]


@settings(max_examples=150)
@given(polynomials())
def test_nonnegative_is_true_everywhere(value: sympy.Expr) -> None:
    if is_nonnegative(value):
        assert min(everywhere(value)) >= 0


@pytest.mark.parametrize("value", [B * S - 1, B * S - B, 2 * S - 2, B * S * H - S * H, ZERO, S])
def test_nonnegative_proves(value: sympy.Expr) -> None:
    assert is_nonnegative(value)


@pytest.mark.parametrize("n", [S + PythonMod(-S, 4), S + 3 + Mod(-S - 3, 4), 4 * S * B])
def test_blocks_of_what_is_padded_to_blocks_are_whole(n: sympy.Expr) -> None:
    blocks = FloorDiv(n, FloorDiv(n, 4))
    assert cancel_rounding(3 * blocks + B) == 12 + B
    assert everywhere(blocks) == [4] * len(everywhere(blocks))


@pytest.mark.parametrize("n", [S, S + PythonMod(-S, 3), S + PythonMod(S, 4), 2 * S, S + 4 * B])
def test_blocks_of_what_may_end_in_a_part_of_one_stay(n: sympy.Expr) -> None:
    blocks = FloorDiv(n, FloorDiv(n, 4))
    assert cancel_rounding(blocks) == blocks


@pytest.mark.parametrize("value", [S - B, -S, S - 2, B * S - H, sympy.Integer(-1)])
def test_nonnegative_does_not_claim(value: sympy.Expr) -> None:
    assert not is_nonnegative(value)


@settings(max_examples=150)
@given(polynomials(), polynomials())
def test_a_quotient_is_exact_everywhere(value: sympy.Expr, by: sympy.Expr) -> None:
    if by == 0:
        return
    quotient = divide(value, by)
    if quotient is not None:
        for v, b, q in zip(everywhere(value), everywhere(by), everywhere(quotient), strict=True):
            assert v == b * q


def test_divide() -> None:
    assert divide(384 * S + 32, sympy.Integer(32)) == 12 * S + 1
    assert divide(B * S * 384, S * 32) == 12 * B
    assert divide(B * S, sympy.Integer(2)) is None
    assert divide(B, S) is None
    assert divide(ZERO, S) == 0
    assert divide(S, S) == 1
    assert divide(FloorDiv(S, 2), ONE) == FloorDiv(S, 2)
    assert divide(FloorDiv(S, 2) * 2, sympy.Integer(2)) == FloorDiv(S, 2)
    assert divide(B * FloorDiv(S, 2), FloorDiv(S, 2)) == B
    assert divide(FloorDiv(S, 2), sympy.Integer(2)) is None
    assert divide(B * S + B, S + 1) == B
    assert divide(B * (S + 1), S + 1) == B
    assert divide(B * S + B, B * (S + 1)) == 1
    assert divide(B * S + S, S * (B + 1)) == 1
    assert divide(B * S, S + 1) is None


def test_products_divide_without_common_factors_of_sums(monkeypatch) -> None:
    """A windowed picture asks this of thousands of products, and sympy's cancel takes its time."""
    monkeypatch.setattr(sympy, "cancel", None)
    n = sympy.Symbol("side", integer=True, positive=True)
    assert divide(28 * n * B * FloorDiv(S, 4), 7 * FloorDiv(S, 4)) == 4 * n * B
    assert divide(6 * n * B, S + n) is None


def test_the_rest_of_a_negative_size_is_that_of_its_divisor() -> None:
    assert to_c(PythonMod(S, B)) == "(seq % batch)"
    assert to_c(PythonMod(S - 5, S)) == "((((seq - 5) % seq) + seq) % seq)"
    assert to_python(PythonMod(S - 5, S)) == "((seq - 5) % seq)"


@settings(max_examples=60)
@given(polynomials(), st.integers(1, 9), st.tuples(*[st.integers(1, 40)] * 3))
def test_printed_source_means_the_expression(
    value: sympy.Expr, by: int, sizes: tuple[int, int, int]
) -> None:
    names = ("batch", "seq", "heads")
    dims = dict(zip(names, sizes, strict=True))
    top = sympy.expand(value**2)
    wanted = [evaluate(value, dims), evaluate(top, dims) // by, evaluate(top, dims) % by]
    values = [value, FloorDiv(top, sympy.Integer(by)), Mod(top, sympy.Integer(by))]
    assert list(compile_evaluator(values, names)(*sizes)) == wanted
    for v, w in zip(values, wanted, strict=True):
        assert eval(to_python(v), {}, dims) == w
        assert eval(to_c(v).replace("/", "//"), {}, dims) == w


def test_the_larger_of_the_smaller() -> None:
    value = sympy.Max(sympy.Min(B, S), S - 3, 1)
    for dims in ({"batch": 2, "seq": 9}, {"batch": 7, "seq": 4}, {"batch": 9, "seq": 1}):
        wanted = evaluate(value, dims)
        assert eval(to_python(value), {}, dims) == wanted
        assert compile_evaluator([value], ("batch", "seq"))(**dims) == (wanted,)
        source = to_c(value)
        assert "ttx::minimum<int64_t>(" in source
        assert eval(re.sub(r"ttx::(max|min)imum<int64_t>", r"\1", source), {}, dims) == wanted


def test_a_negative_size_is_made_to_divide_evenly_in_c() -> None:
    value = FloorDiv(-S, sympy.Integer(2))
    assert to_c(value) == "(((-seq) - ((-seq) % 2 + 2) % 2) / 2)"
    assert to_c(FloorDiv(S, sympy.Integer(2))) == "(seq / 2)"


def test_products() -> None:
    assert product(()) == 1
    assert product((B, S, sympy.Integer(3))) == 3 * B * S
