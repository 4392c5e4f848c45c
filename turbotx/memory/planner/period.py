"""Periods: equal layers have equal buffers, so a few layers are placed and their placement
repeated.

In: lifetimes and sizes of a graph with many equal layers. Out: placements of all buffers, each
derived from one for fewer layers whose middle is repeated, if that causes no overlap::

    repeated(lifetimes, sizes, period, place)   # 12 layers: place() sees four, the first two repeat
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from turbotx.memory.planner.orientation import overlap_matrix
from turbotx.memory.planner.plan import Lifetime

Ints = npt.NDArray[np.int64]
Place = Callable[[Sequence[Lifetime], Sequence[int]], Iterator[list[int]]]

WAYS = ((4, 2), (3, 1))
"""How many layers are placed, the last of them behind those that repeat, and how many repeat
together: two first, since buffers may change places from one to the next, as BLOOM's do, and not
the very first layer, whose buffers meet others than those of the next."""
LEAST_REPEATS = 6


@dataclass(frozen=True, slots=True)
class Period:
    """`repeats` runs of `count` buffers from index `first` on, each `span` launches after the
    previous."""

    first: int
    count: int
    span: int
    repeats: int


def find_period(lifetimes: Sequence[Lifetime], sizes: Sequence[int]) -> Period | None:
    """Return the longest periodic run of buffers in order of their begins; None if it has fewer
    than `LEAST_REPEATS` repeats."""
    order = _order(lifetimes)
    begin = np.array([lifetimes[i].begin for i in order], dtype=np.int64)
    length = np.array([lifetimes[i].end for i in order], dtype=np.int64) - begin
    size = np.array([sizes[i] for i in order], dtype=np.int64)
    best: Period | None = None
    for count in range(1, len(order) // LEAST_REPEATS + 1):
        shift = begin[count:] - begin[:-count]
        same = (length[count:] == length[:-count]) & (size[count:] == size[:-count])
        if not same.any():
            continue
        span = int(np.bincount(shift[same]).argmax())
        ends = np.flatnonzero(np.concatenate(([True], ~(same & (shift == span)), [True])))
        runs = np.diff(ends) - 1
        longest = int(runs.argmax())
        repeats = int(runs[longest]) // count + 1
        # For the same buffers, the shortest period comes first.
        if span > 0 and (best is None or repeats * count > best.repeats * best.count):
            best = Period(int(ends[longest]), count, span, repeats)
    return best if best is not None and best.repeats >= LEAST_REPEATS else None


def repeated(
    lifetimes: Sequence[Lifetime], sizes: Sequence[int], period: Period, place: Place,
    ways: Sequence[tuple[int, int]] = WAYS,
) -> Iterator[list[int]]:  # fmt: skip
    """Yield placements, in bytes, that repeat what `place` finds for fewer layers, without those
    that overlap: of the first of `ways` that has any."""
    order, found = _order(lifetimes), False
    for way in ways:
        for offsets in _repeat_each(lifetimes, sizes, period, place, order, *way):
            if not _overlap(lifetimes, sizes, offsets):
                found = True
                yield offsets
        if found:
            return


def _repeat_each(
    lifetimes: Sequence[Lifetime], sizes: Sequence[int], period: Period, place: Place,
    order: Sequence[int], kept: int, unit: int,
) -> Iterator[list[int]]:  # fmt: skip
    """Repeat every placement of `kept` layers, `unit` of them at a time."""
    left_out = (period.repeats - kept) // unit * unit
    begin = period.first + (kept - 1) * period.count
    cut = range(begin, begin + left_out * period.count)
    short = _shorten(lifetimes, order, period, cut)
    names = [i for i, _ in short]
    for offsets in place([x for _, x in short], [sizes[i] for i in names]):
        yield _repeat(dict(zip(names, offsets, strict=True)), order, cut, unit * period.count)


def _order(lifetimes: Sequence[Lifetime]) -> list[int]:
    return sorted(range(len(lifetimes)), key=lambda i: lifetimes[i].begin)


def _shorten(
    lifetimes: Sequence[Lifetime], order: Sequence[int], period: Period, cut: range
) -> list[tuple[int, Lifetime]]:
    """Return the kept buffers, with lifetimes that omit the layers left out. cut: the positions, in
    the order, of what is left out."""
    shift = len(cut) // period.count * period.span
    since = lifetimes[order[cut.start]].begin
    kept = []
    for place, i in enumerate(order):
        at = lifetimes[i]
        if place < cut.start:  # one that ends in the next layer still ends in the following one
            last = at.end if at.end <= since + period.span else max(since, at.end - shift)
            kept.append((i, Lifetime(at.begin, max(last, at.begin + 1))))
        elif place >= cut.stop:
            kept.append((i, Lifetime(at.begin - shift, at.end - shift)))
    return kept


def _repeat(known: dict[int, int], order: Sequence[int], cut: range, repeats: int) -> list[int]:
    """Return every buffer's offset; those left out have those of the `repeats` before the cut."""
    found = [0] * len(order)
    for place, i in enumerate(order):
        before = cut.start - repeats + (place - cut.start) % repeats
        found[i] = known[order[before] if place in cut else i]
    return found


def _overlap(lifetimes: Sequence[Lifetime], sizes: Sequence[int], offsets: Sequence[int]) -> bool:
    """Return whether two buffers alive at the same time share a byte."""
    low = np.array(offsets)
    high = low + np.array(sizes)
    shared = (low[:, None] < high) & (low < high[:, None])
    return bool((shared & overlap_matrix(lifetimes)).any())
