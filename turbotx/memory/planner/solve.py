"""The solver for one shape: as close to the lower bound as its budget allows.

In: lifetimes and aligned sizes. Out: offsets and a footprint. A portfolio of greedy and skyline
orders comes first, then a bounded local search over the best order's keys; both stop as soon as the
footprint equals the lower bound::

    solve(lifetimes, [512, 256, 512]).offsets   # -> (0, 512, 0)
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from turbotx.memory.planner.greedy import fit, footprint
from turbotx.memory.planner.plan import Buffer, Lifetime, lower_bound
from turbotx.memory.planner.skyline import Boxes, Floats, skyline_fit

MAX_EVALUATIONS = 200
TIME_LIMIT_S = 1.0

_KEY_EXPONENTS = ((2.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.5, 1.0), (0.0, 1.0), (1.0, 0.5))
"""Skyline keys lifetime**a * size**b, the best on google/minimalloc's instances first."""


@dataclass(frozen=True, slots=True)
class Solution:
    """Offsets in bytes at one shape; `optimal` if the footprint equals the lower bound."""

    offsets: tuple[int, ...]
    footprint_nbytes: int
    lower_bound_nbytes: int

    @property
    def optimal(self) -> bool:
        """Whether the footprint equals the lower bound, so that no plan is smaller."""
        return self.footprint_nbytes == self.lower_bound_nbytes


def solve(
    lifetimes: Sequence[Lifetime],
    sizes: Sequence[int],
    *,
    max_evaluations: int = MAX_EVALUATIONS,
    time_limit_s: float = TIME_LIMIT_S,
) -> Solution:
    """Return the best placement within the budget; deterministic unless the time limit is reached.

    One evaluation places all buffers: 0.3 ms for 60 buffers, 5 ms for 450.
    """
    stop_at = time.perf_counter() + time_limit_s
    bound = _lower_bound(lifetimes, sizes)
    best = Solution((0,) * len(sizes), 0, 0)
    for count, offsets in enumerate(_placements(lifetimes, sizes)):
        peak = footprint(offsets, sizes)
        if not count or peak < best.footprint_nbytes:
            best = Solution(tuple(offsets), peak, bound)
        if best.optimal or count >= max_evaluations or time.perf_counter() > stop_at:
            break
    return best


def optima(
    lifetimes: Sequence[Lifetime], sizes: Sequence[int], max_evaluations: int = MAX_EVALUATIONS
) -> Iterator[list[int]]:
    """Yield the placements, in bytes, whose footprint is the lower bound, among those `solve`
    tries."""
    bound = _lower_bound(lifetimes, sizes)
    for offsets in itertools.islice(_placements(lifetimes, sizes), max_evaluations):
        if footprint(offsets, sizes) == bound:
            yield offsets


def _lower_bound(lifetimes: Sequence[Lifetime], sizes: Sequence[int]) -> int:
    return lower_bound(Buffer("", n, time) for time, n in zip(lifetimes, sizes, strict=True))


def portfolio(lifetimes: Sequence[Lifetime], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Yield the placements of each greedy order and each skyline key, in bytes."""
    for order in _greedy_orders(lifetimes, sizes):
        yield fit(lifetimes, sizes, order)
    kept = [i for i, nbytes in enumerate(sizes) if nbytes]
    boxes = Boxes.of([lifetimes[i] for i in kept], [sizes[i] for i in kept])
    for length_power, size_power in _KEY_EXPONENTS:
        yield _spread(skyline_fit(boxes, _key(boxes, length_power, size_power)), kept, len(sizes))


def _placements(lifetimes: Sequence[Lifetime], sizes: Sequence[int]) -> Iterator[list[int]]:
    yield from portfolio(lifetimes, sizes)
    kept = [i for i, nbytes in enumerate(sizes) if nbytes]
    boxes = Boxes.of([lifetimes[i] for i in kept], [sizes[i] for i in kept])
    for offsets in _search(boxes):
        yield _spread(offsets, kept, len(sizes))


def _greedy_orders(lifetimes: Sequence[Lifetime], sizes: Sequence[int]) -> Iterator[list[int]]:
    """By size, by area, by lifetime, and by time in both directions."""
    count = len(sizes)
    length = [x.end - x.begin for x in lifetimes]
    yield sorted(range(count), key=lambda i: (-sizes[i], -length[i]))
    yield sorted(range(count), key=lambda i: (-sizes[i] * length[i], -sizes[i]))
    yield sorted(range(count), key=lambda i: (-length[i], -sizes[i]))
    yield sorted(range(count), key=lambda i: (lifetimes[i].begin, -sizes[i]))
    yield sorted(range(count), key=lambda i: (-lifetimes[i].end, -sizes[i]))


def _key(boxes: Boxes, length_power: float, size_power: float) -> Floats:
    key: Floats = length_power * np.log(boxes.end - boxes.begin) + size_power * np.log(boxes.size)
    return key


def _spread(offsets: Sequence[int], kept: Sequence[int], count: int) -> list[int]:
    spread = [0] * count
    for index, offset in zip(kept, offsets, strict=True):
        spread[index] = offset
    return spread


def _search(boxes: Boxes, seed: int = 0) -> Iterator[list[int]]:
    """Yield skyline placements for keys varied from the best one so far, without end.

    First random mixtures of lifetime and size, then local steps: half of them raise the key of a
    buffer that reaches the top 3 % of the footprint, all of them perturb a few others.
    """
    random = np.random.default_rng(seed)
    count = len(boxes.size)
    best_key, best_peak = _key(boxes, 2.0, 1.0), -1
    best_offsets = np.zeros(count, dtype=np.int64)
    step = 0
    while count > 1:
        if step < 30:
            length_power, size_power = random.uniform(0, 2, 2)
            key = _key(boxes, length_power, size_power) + random.normal(0, 0.2, count)
        else:
            key = best_key.copy()
            share = random.choice([0.02, 0.05, 0.2])
            if random.random() < 0.5:
                share = 0.02
                high = np.flatnonzero(best_offsets + boxes.size >= 0.97 * best_peak)
                key[random.choice(high)] += abs(random.normal(0, 1.5))
            shaken = random.random(count) < share
            key[shaken] += random.normal(0, 1.0, int(shaken.sum()))
        offsets = skyline_fit(boxes, key)
        yield offsets
        peak = footprint(offsets, boxes.size.tolist())
        if best_peak < 0 or peak <= best_peak:
            best_key, best_peak, best_offsets = key, peak, np.array(offsets, dtype=np.int64)
        step += 1
