"""Selects the orientations to keep: few, and together at the lower bound for every sample.

In: lifetimes, sizes at a seed, sizes at sample shapes. Out: one or more orientations. For each
shape, a planner uses the one with the smallest footprint::

    choose_orientations(workload, seed, samples)   # one for BERT, two where seq² meets seq
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from turbotx.memory.planner.greedy import footprint
from turbotx.memory.planner.orientation import Forms, Orientation, orient
from turbotx.memory.planner.period import WAYS, find_period, repeated
from turbotx.memory.planner.plan import Lifetime, Workload
from turbotx.memory.planner.solve import optima, portfolio, solve

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

MAX_ORIENTATIONS = 4
MAX_SOLVED = 10
GOOD_ENOUGH = 1.0 + 1e-4
IMAGINED_SAMPLES = 48
SEARCH_EVALUATIONS = 60
"""Local search evaluations per sample, after the portfolio: about 0.1 s if the bound cannot be
met."""

QUICK_EVALUATIONS = 11
"""Those of the portfolio, before the search."""

MANY_LAYERS = 8
"""From this many equal layers on, a few of them are placed first; all only if that misses the
bound: 48 layers of Llama are 436 buffers."""

BUILD_LIMIT_S = 5.0
"""Only graphs of a thousand or more buffers reach it; smaller ones are limited by the counts."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    orientation: Orientation
    ratio: Floats
    """Footprint over lower bound, per sample."""


def imagine_samples(seed: Int64s) -> Int64s:
    """Return sizes at further shapes, (classes, n): each class of the seed scaled by 1/16 to 16.

    Real shapes scale the classes together; these also cover classes that scale independently, as
    attention scores and hidden states do.
    """
    random = np.random.default_rng(0)
    scale = np.exp2(random.uniform(-4, 4, (len(seed), IMAGINED_SAMPLES)))
    return np.maximum(np.rint(seed[:, None] * scale).astype(np.int64), 1)


def choose_orientations(
    workload: Workload, seed: Int64s, samples: Int64s, live: Forms
) -> list[Orientation]:
    """Return orientations such that at least one is good at each sample; the first one suits the
    seed.

    seed: (classes,); samples: (classes, n) with any n; live: the lower bound's forms. Imagined
    samples replace missing ones, and otherwise break ties. Solves the seed, then repeatedly the
    sample where the kept ones are worst, until none is worse than 1.0001 x the lower bound,
    MAX_ORIENTATIONS are kept, MAX_SOLVED shapes are solved, or BUILD_LIMIT_S seconds have passed.
    """
    stop_at = time.perf_counter() + BUILD_LIMIT_S
    shapes = _Shapes.of(seed, samples, live)
    best = np.full(len(shapes.bound), np.inf)
    kept: list[_Candidate] = []
    solved: set[int] = set()
    at = 0
    while True:
        solved.add(at)
        candidate = _best_at(workload, shapes, best, at)
        if candidate is not None:
            kept.append(candidate)
            best = np.minimum(best, candidate.ratio)
        worst_first = np.argsort(-best[: shapes.expected], kind="stable").tolist()
        unsolved = [j for j in worst_first if j not in solved]
        if not unsolved or best[unsolved[0]] <= GOOD_ENOUGH:
            break
        if len(kept) >= MAX_ORIENTATIONS or len(solved) >= MAX_SOLVED:
            break
        if time.perf_counter() > stop_at:
            break
        at = unsolved[0]
    return [candidate.orientation for candidate in _drop_needless(kept, best, shapes.expected)]


@dataclass(frozen=True, slots=True)
class _Shapes:
    """The seed, the expected shapes (`expected` in number, with the seed), then imagined ones."""

    sizes: Int64s
    bound: Int64s
    weight: Floats
    expected: int

    @classmethod
    def of(cls, seed: Int64s, samples: Int64s, live: Forms) -> _Shapes:
        sizes = np.concatenate([seed[:, None], samples, imagine_samples(seed)], axis=1)
        expected = 1 + samples.shape[1] if samples.shape[1] else sizes.shape[1]
        weight = np.where(np.arange(sizes.shape[1]) < expected, 1.0, 1e-6)
        return cls(sizes, np.maximum((live @ sizes).max(axis=0), 1), weight, expected)


def _best_at(workload: Workload, shapes: _Shapes, best: Floats, at: int) -> _Candidate | None:
    """Return the solution of one shape that is best over all shapes; None if none improves that
    one."""
    per_buffer = shapes.sizes[list(workload.size_class)]
    sizes = per_buffer[:, at].tolist()
    chosen: _Candidate | None = None
    least = np.inf
    for offsets in _solutions(workload, sizes, int(shapes.bound[at])):
        orientation = orient(workload.lifetimes, offsets)
        ends = orientation.offsets(per_buffer) + per_buffer
        ratio = ends.max(axis=0, initial=0) / shapes.bound
        score = float(np.minimum(np.minimum(best, 1e6), ratio) @ shapes.weight)
        if ratio[at] < best[at] and score < least:
            chosen, least = _Candidate(orientation, ratio), score
        if ratio.max() <= GOOD_ENOUGH:
            break
    return chosen


def _solutions(workload: Workload, sizes: list[int], bound: int) -> Iterator[list[int]]:
    """Yield placements at one shape, way by way until one reaches the bound: of quick ways all,
    since those that are equal at this shape differ at others."""
    lifetimes = workload.lifetimes
    period = find_period(lifetimes, sizes)
    ways = [(portfolio(lifetimes, sizes), True), (_search(lifetimes, sizes), False)]
    if period is not None:
        quick = partial(optima, max_evaluations=QUICK_EVALUATIONS)
        place = 0 if period.repeats >= MANY_LAYERS else 1
        ways[place:place] = [
            (repeated(lifetimes, sizes, period, quick, WAYS[:1]), True),
            (repeated(lifetimes, sizes, period, optima), False),
        ]
    for way, is_quick in ways:
        solved = False
        for offsets in way:
            solved = solved or footprint(offsets, sizes) <= bound
            yield offsets
            if solved and not is_quick:
                break
        if solved:
            return


def _search(lifetimes: Sequence[Lifetime], sizes: Sequence[int]) -> Iterator[list[int]]:
    yield list(solve(lifetimes, sizes, max_evaluations=SEARCH_EVALUATIONS).offsets)


def _drop_needless(kept: list[_Candidate], best: Floats, expected: int) -> list[_Candidate]:
    """Drop, oldest first, candidates that the others match at every expected shape."""
    needed = list(kept)
    for candidate in kept:
        others = [other for other in needed if other is not candidate]
        if others:
            ratio = np.min([other.ratio for other in others], axis=0)
            if bool((ratio <= best)[:expected].all()):
                needed = others
    return needed
