"""Constants folded in statements: each rule, and what it must leave alone.

In: a line or two of source and what names stand for. Out: the source that is left.
"""

from __future__ import annotations

import ast

import pytest

from turbotx.kernels.triton.fold import fold, settle

VALUES = {"YES": True, "NO": False, "N": 8, "HALF": 0.5, "KIND": "a", "NONE": None}


def folded(text: str) -> str:
    values = {name: ast.Constant(value) for name, value in VALUES.items()}
    return "\n".join(map(ast.unparse, fold(ast.parse(text).body, values)))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("if YES: x = 1\nelse: x = 2", "x = 1"),
        ("if KIND == 'b': x = 1\nelif N < 9: x = 2", "x = 2"),
        ("if NONE is None and not NO: x = 1", "x = 1"),
        ("if NO: x = 1", ""),
        ("if x:\n    if NO: y = 1", ""),
        ("if x or YES: y = 1", "y = 1"),
        ("if NO or x == N: y = 1", "if x == 8:\n    y = 1"),
        ("if YES and x and y: z = 1", "if x and y:\n    z = 1"),
        ("x = a if NO else b", "x = b"),
        ("x = a if b else N", "x = a if b else 8"),
        ("x = y * (N // 2 * HALF)", "x = y * 2.0"),
        ("x = y + (N - 8)", "x = y"),
        ("x = y * YES + y * (N - 7)", "x = y * True + y"),
        ("x = y + 0.0", "x = y + 0.0"),
        ("x = a & YES", "x = a"),
        ("x = load(p, mask=YES, other=0.0)", "x = load(p)"),
        ("x = load(p, mask=m & YES, other=0.0, kind=NONE)", "x = load(p, mask=m, other=0.0)"),
        ("x = x", ""),
        ("N = 3", ""),
    ],
)
def test_what_constants_decide(text: str, left: str) -> None:
    assert folded(text) == left


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a = 1\nx = a + b", "x = 1 + b"),
        ("a = p\nb = a\nx = load(b)", "x = load(p)"),
        ("a = 1\na = 1\nx = load(a)", "x = load(1)"),
        ("a = 1\na = 2\nx = load(a)", "a = 1\na = 2\nx = load(a)"),
        ("a = 1\na += 1\nx = load(a)", "a = 1\na += 1\nx = load(a)"),
        ("a = p\np += 1\nx = load(a)", "a = p\np += 1\nx = load(a)"),
        ("p = 1\nx = load(p)", "p = 1\nx = load(p)"),
    ],
)
def test_names_that_settle(text: str, left: str) -> None:
    settled = settle(ast.parse(text).body, ["p"])
    assert "\n".join(map(ast.unparse, settled)) == left
