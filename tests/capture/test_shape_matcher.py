"""Sizes of calls: the compiled match beside the words that say why there is none."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbotx.capture.shape_matcher import InputSize, ShapeMatcher, SizeGuard, SizeRules
from turbotx.ir.sizes import Sizes


def size(text, *dims, solve=None):
    return InputSize(Sizes((text,)), dims, solve, text)


BATCH, SEQ = size("batch", "batch", solve=("batch", 1, 0)), size("seq", "seq", solve=("seq", 1, 0))
RULES = SizeRules(
    ("batch", "seq", "half"),
    (("ids", (BATCH, SEQ)),
     ("mask", (BATCH, size("2 * half + 1", "half", solve=("half", 2, 1)))),
     ("both", (size("seq + half", "seq", "half"), size("4")))),
    (SizeGuard(Sizes(("seq <= 6",)), ("seq",), "seq <= 6"),
     SizeGuard(Sizes(("12 // (seq - 2) > 0",)), ("seq",), "seq is not 2")),
)  # fmt: skip


def test_dims_follow_from_sizes() -> None:
    assert ShapeMatcher(RULES).match([(3, 5), (3, 9), (9, 4)]) == (3, 5, 4)


@pytest.mark.parametrize(
    "shapes, why",
    [
        ([(3, 5), (2, 9), (9, 4)], r"mask.shape\[0\] is 2, not batch=3"),
        ([(3, 5), (3, 8), (9, 4)], r"mask.shape\[1\] is 8"),
        ([(3, 5), (3, 9), (8, 4)], r"both.shape\[0\] is 8"),
        ([(3, 5), (3, 9), (9, 5)], r"both.shape\[1\] is 5"),
        ([(3, 7), (3, 9), (11, 4)], "seq <= 6 does not hold"),
        ([(3, 2), (3, 9), (6, 4)], "seq is not 2 does not hold"),
        ([(3, 5), (3, 1), (5, 4)], "half is 0"),
    ],
)
def test_what_does_not_hold_is_said(shapes, why) -> None:
    assert ShapeMatcher(RULES).match(shapes) is None
    assert re.search(why, ShapeMatcher(RULES).explain(shapes))


@given(st.lists(st.integers(0, 9), min_size=6, max_size=6))
def test_a_match_is_where_there_is_nothing_to_explain(sizes) -> None:
    matcher, shapes = ShapeMatcher(RULES), [tuple(sizes[k : k + 2]) for k in (0, 2, 4)]
    assert (matcher.match(shapes) is None) == bool(matcher.explain(shapes))


def test_a_dim_that_no_input_has_never_matches() -> None:
    matcher = ShapeMatcher(SizeRules(("batch", "lost"), (("x", (BATCH,)),), ()))
    assert matcher.match([(3,)]) is None and "lost does not follow" in matcher.explain([(3,)])
