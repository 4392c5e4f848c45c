"""Pairwise choice of test cases: few rows in which every pair of levels of two factors occurs.

In: factors with their levels, and levels that do not go together. Out: rows, a level of every
factor each; levels that come first in their factor are preferred, as in::

    cover_pairs({"dtype": ("float32", "bfloat16"), "planner": ("symbolic", "greedy")})  ->  4 rows

Greedy, a row at a time (as AETG does): rarely more than a fifth above the fewest.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence

Row = dict[str, str]
Level = tuple[str, str]
"""A factor and one of its levels."""
Refused = Sequence[Mapping[str, Collection[str]]]


def cover_pairs(factors: Mapping[str, Sequence[str]], refused: Refused = ()) -> list[Row]:
    """Return rows that hold every pair of levels of two factors, but those that are refused.

    refused: by factor the levels that no row has all together. The first levels of all factors must
    go with everything.
    """

    def allowed(row: Row) -> bool:
        return not any(all(row.get(f) in found for f, found in one.items()) for one in refused)

    def pairs(row: Row) -> Iterator[tuple[Level, Level]]:
        return itertools.combinations([(f, row[f]) for f in factors if f in row], 2)

    left = dict.fromkeys(  # in order: every process collects the same rows
        ((a, x), (b, y))
        for a, b in itertools.combinations(factors, 2)
        for x, y in itertools.product(factors[a], factors[b])
        if allowed({a: x, b: y})
    )
    rows = []
    while left:
        row = dict(next(iter(left)))
        for name in factors:
            if name not in row:
                tries = [row | {name: level} for level in factors[name]]
                row = max(
                    filter(allowed, tries), key=lambda one: sum(p in left for p in pairs(one))
                )
        for pair in pairs(row):
            left.pop(pair, None)
        rows.append({f: row[f] for f in factors})
    return rows
