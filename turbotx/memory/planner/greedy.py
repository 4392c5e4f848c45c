"""Greedy by size: the largest buffer first, into the smallest gap free during its lifetime.

In: lifetimes and, per shape, sizes. Out: offsets and a footprint. The method of TensorFlow
Lite's "greedy by size" (arXiv 2001.03288); `fit` is the step that the seed solver shares::

    fit(lifetimes, [512, 256, 512], order=[0, 2, 1])   # -> [0, 512, 0]
"""

from __future__ import annotations

from collections.abc import Sequence

from turbotx.memory.planner.plan import Lifetime, Planner


def fit(lifetimes: Sequence[Lifetime], sizes: Sequence[int], order: Sequence[int]) -> list[int]:
    """Return offsets in bytes of buffers placed one by one in `order`.

    Each goes into the tightest gap between earlier buffers that are alive at the same time, or
    above them if no gap fits.
    """
    offsets = [0] * len(sizes)
    placed: list[tuple[int, int, int, int]] = []
    for index in order:
        nbytes = sizes[index]
        if not nbytes:
            continue
        begin, end = lifetimes[index].begin, lifetimes[index].end
        previous_end = 0
        chosen = -1
        tightest = 0
        for low, high, placed_begin, placed_end in placed:
            if placed_begin >= end or begin >= placed_end:
                continue
            gap = low - previous_end
            if gap >= nbytes and (chosen < 0 or gap < tightest):
                chosen, tightest = previous_end, gap
            if high > previous_end:
                previous_end = high
        if chosen < 0:
            chosen = previous_end
        offsets[index] = chosen
        placed.append((chosen, chosen + nbytes, begin, end))
        placed.sort()
    return offsets


def footprint(offsets: Sequence[int], sizes: Sequence[int]) -> int:
    """Return the end of the highest buffer, in bytes."""
    return max((o + s for o, s in zip(offsets, sizes, strict=True) if s), default=0)


class GreedyPlanner(Planner):
    """Plans every shape from scratch; keeps no state, so threads may share it."""

    def offsets(self, class_nbytes: Sequence[int]) -> tuple[Sequence[int], int]:
        """Return each buffer's offset and the arena's size, in bytes, for bytes by size class."""
        sizes = self._workload.aligned_sizes(class_nbytes)
        order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
        offsets = fit(self._workload.lifetimes, sizes, order)
        return offsets, footprint(offsets, sizes)
