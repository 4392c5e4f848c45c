"""The seed solver: one placement at one shape, as near to the lower bound as time allows.

In: lifetimes and aligned sizes. Out: offsets and a footprint; a portfolio of greedy orders first,
stopping at the lower bound::

    solve(lifetimes, [512, 256, 512]).offsets   # -> [0, 512, 0]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from turbotx.memory.greedy import fit, footprint
from turbotx.memory.plan import Buffer, Lifetime, lower_bound


@dataclass(frozen=True, slots=True)
class Solution:
    """Offsets in bytes at one shape; `optimal` when the footprint is the lower bound."""

    offsets: tuple[int, ...]
    footprint_nbytes: int
    lower_bound_nbytes: int

    @property
    def optimal(self) -> bool:
        return self.footprint_nbytes == self.lower_bound_nbytes


def solve(lifetimes: Sequence[Lifetime], sizes: Sequence[int]) -> Solution:
    """The best placement found; stops as soon as one stands at the lower bound."""
    bound = lower_bound(
        Buffer("", nbytes, lifetime) for lifetime, nbytes in zip(lifetimes, sizes, strict=True)
    )
    best: tuple[int, list[int]] | None = None
    for order in greedy_orders(lifetimes, sizes):
        for tight in (True, False):
            offsets = fit(lifetimes, sizes, order, best=tight)
            peak = footprint(offsets, sizes)
            if best is None or peak < best[0]:
                best = (peak, offsets)
            if peak == bound:
                return Solution(tuple(offsets), peak, bound)
    assert best is not None
    return Solution(tuple(best[1]), best[0], bound)


def greedy_orders(lifetimes: Sequence[Lifetime], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Orders worth trying: by size, by area, by how busy the launches are, by time, both ways."""
    count = len(sizes)
    length = [x.end - x.begin for x in lifetimes]
    keys: list[Callable[[int], tuple[int, ...]]] = [
        lambda i: (-sizes[i], -length[i]),
        lambda i: (-sizes[i] * length[i], -sizes[i]),
        lambda i: (-length[i], -sizes[i]),
        lambda i: (lifetimes[i].begin, -sizes[i]),
        lambda i: (-lifetimes[i].end, -sizes[i]),
    ]
    for key in keys:
        yield sorted(range(count), key=key)
