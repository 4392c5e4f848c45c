"""Pairwise choice of cases: every pair that is allowed occurs, and none that is refused.

In: factors of two to seven levels. Out: which pairs the rows hold, and how many rows there are.
"""

from __future__ import annotations

import itertools

from tests.pairwise import cover_pairs

FACTORS = {
    "a": [f"a{k}" for k in range(7)],
    "b": [f"b{k}" for k in range(5)],
    "c": [f"c{k}" for k in range(3)],
    "d": ["d0", "d1"],
}
REFUSED = [{"b": ["b3", "b4"], "c": ["c2"]}, {"a": ["a1"], "b": ["b1"], "d": ["d1"]}]


def test_every_pair_that_is_allowed_is_in_a_row() -> None:
    rows = cover_pairs(FACTORS, REFUSED)
    found = {
        pair for row in rows for pair in itertools.combinations(row.items(), 2)
    }  # fmt: skip
    for (a, levels), (b, others) in itertools.combinations(FACTORS.items(), 2):
        for x, y in itertools.product(levels, others):
            refused = (a, b) == ("b", "c") and x in ("b3", "b4") and y == "c2"
            assert (((a, x), (b, y)) in found) != refused
    assert not any(r["a"] == "a1" and r["b"] == "b1" and r["d"] == "d1" for r in rows)


def test_rows_are_few_and_prefer_first_levels() -> None:
    rows = cover_pairs(FACTORS)
    assert 35 <= len(rows) <= 40
    assert sum(row["d"] == "d0" for row in rows) > len(rows) / 2
    assert rows == cover_pairs(FACTORS)
