"""Skyline placement: fill the lowest ledge first, with the preferred buffer that fits.

In: lifetimes, sizes and a preference per buffer. Out: offsets. Buffers are rectangles with a fixed
time; the skyline is the top edge of what is placed. After Sekiyama et al., "Profile-guided memory
optimization for deep neural networks" (arXiv 1804.10001), with any key instead of the lifetime::

    skyline_fit(Boxes(begin, end, size), key=end - begin)      # longest lifetime first
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from turbotx.memory.planner.plan import Lifetime

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Boxes:
    """Buffers as arrays: alive in [begin, end), `size` bytes each, all > 0."""

    begin: Ints
    end: Ints
    size: Ints

    @classmethod
    def of(cls, lifetimes: Sequence[Lifetime], sizes: Sequence[int]) -> Boxes:
        """Return boxes as int64 arrays. sizes: bytes, one per lifetime."""
        return cls(
            np.array([x.begin for x in lifetimes], dtype=np.int64),
            np.array([x.end for x in lifetimes], dtype=np.int64),
            np.array(sizes, dtype=np.int64),
        )


def skyline_fit(boxes: Boxes, key: Floats) -> list[int]:
    """Return offsets in bytes; each ledge takes the buffer of largest `key` that fits on it.

    If none fits, the ledge is raised to its lower neighbour and that space stays unused.
    """
    order = np.argsort(-key, kind="stable")
    begin, end = boxes.begin[order], boxes.end[order]
    waiting = np.ones(len(order), dtype=bool)
    begins, ends = begin.tolist(), end.tolist()
    sizes, names = boxes.size[order].tolist(), order.tolist()
    offsets = [0] * len(names)
    ledges = [(min(begins), max(ends), 0)] if names else []
    left = len(names)
    while left:
        at = min(range(len(ledges)), key=lambda i: ledges[i][2])
        low, high, height = ledges[at]
        fits = waiting & (begin >= low) & (end <= high)
        chosen = int(fits.argmax())
        if not fits[chosen]:
            _raise_ledge(ledges, at)
            continue
        waiting[chosen] = False
        left -= 1
        offsets[names[chosen]] = height
        first, last = begins[chosen], ends[chosen]
        pieces = [(low, first, height), (first, last, height + sizes[chosen]), (last, high, height)]
        _replace_ledge(ledges, at, [piece for piece in pieces if piece[0] < piece[1]])
    return offsets


def _raise_ledge(ledges: list[tuple[int, int, int]], at: int) -> None:
    low, high, _ = ledges[at]
    neighbours = [ledges[i][2] for i in (at - 1, at + 1) if 0 <= i < len(ledges)]
    _replace_ledge(ledges, at, [(low, high, min(neighbours))])


def _replace_ledge(
    ledges: list[tuple[int, int, int]], at: int, pieces: list[tuple[int, int, int]]
) -> None:
    """Replace one ledge by pieces, merging neighbours of equal height."""
    first, last = max(0, at - 1), at + 2
    joined: list[tuple[int, int, int]] = []
    for piece in [*ledges[first:at], *pieces, *ledges[at + 1 : last]]:
        if joined and joined[-1][2] == piece[2]:
            joined[-1] = (joined[-1][0], piece[1], piece[2])
        else:
            joined.append(piece)
    ledges[first:last] = joined
