"""Compiled matcher: it gives the dims that `ShapeMatcher` gives, and None where that gives None."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from torch import nn

from turbotx.capture.compiled_matcher import CompiledMatcher
from turbotx.capture.guards import Guard
from turbotx.capture.shape_matcher import ShapeMatcher
from turbotx.capture.trace import capture
from turbotx.ir.expr import dim


class Inner(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


CALLS = {
    "equal sizes": (lambda x, y: x + y, [(3, 5), (3, 5)]),
    "a guard": (lambda x, y: x[:, 2:] * 2 if x.shape[1] != 7 else x, [(3, 5), (2, 4)]),
    "one more": (lambda x, y: torch.cat([x, x[:, :1]], 1) + y, [(3, 5), (3, 6)]),
}
SHAPES = [
    [(3, 5), (3, 5)], [(3, 5), (3, 6)], [(1, 1), (1, 1)], [(2, 7), (2, 7)], [(4, 1), (4, 2)],
    [(1, 8), (9, 9)],
]  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_dims_are_the_same(case: str) -> None:
    function, sizes = CALLS[case]
    captured = capture(Inner(function).eval(), tuple(torch.randn(s) for s in sizes), {})
    compiled, slow = CompiledMatcher(captured), ShapeMatcher(captured)
    assert compiled.is_complete
    found = [compiled.match(shapes) for shapes in SHAPES]
    assert found == [slow.match(shapes) for shapes in SHAPES]
    assert any(found) and not all(found)


def test_a_guard_that_is_no_comparison_is_left_to_who_solves() -> None:
    captured = capture(Inner(lambda x: x + 1).eval(), (torch.randn(3, 8),), {})
    either = Guard(sympy.Or(sympy.Eq(dim("batch"), 1), sympy.Gt(dim("seq"), 4)), "either")
    compiled = CompiledMatcher(replace(captured, guards=(either,)))
    assert not compiled.is_complete and compiled.match([(3, 8)]) is None
