"""Layered layout: positions of a graph's boxes, flowing from top to bottom, without Graphviz.

In: boxes with sizes, in topological order, and arrows between them. Out: centres of boxes, and the
points at which an arrow bends::

    lay_out({"a": (80, 30), "b": (80, 30)}, [("a", "b")]).centres  ->  {"a": (40, 15), ...}

Sugiyama's scheme: a rank per box, bends where an arrow crosses a rank (one lane for all arrows of a
source), barycentres for the order within ranks, then a least-squares fit for x.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

RANK_GAP, BOX_GAP, LANE = 34.0, 26.0, 10.0
SWEEPS, ALIKE = 12, 10.0

Slot: TypeAlias = "str | tuple[str, int]"
"""A box, or the bend of a source's lane at a rank."""


@dataclass(frozen=True)
class LayeredDrawing:
    """The positions of boxes and arrows.

    centres: (x, y) of each box.
    bends: points that an arrow passes between its boxes, from top to bottom.
    width, height: of the whole drawing, from (0, 0).
    """

    centres: dict[str, tuple[float, float]]
    bends: dict[tuple[str, str], list[tuple[float, float]]]
    width: float
    height: float


@dataclass
class _Ranks:
    rows: list[list[Slot]]
    above: dict[Slot, list[Slot]] = field(default_factory=dict)
    below: dict[Slot, list[Slot]] = field(default_factory=dict)


def lay_out(
    sizes: Mapping[str, tuple[float, float]], arrows: Iterable[tuple[str, str]]
) -> LayeredDrawing:
    """Place boxes of these (width, height); the time is linear in the number of boxes and bends."""
    arrows = list(dict.fromkeys(arrows))
    if not sizes:
        return LayeredDrawing({}, {}, 0.0, 0.0)
    rank = _rank(list(sizes), arrows)
    ranks = _make_rows(sizes, arrows, rank)
    _order(ranks)
    width = {s: sizes[s][0] if isinstance(s, str) else LANE for row in ranks.rows for s in row}
    x = _fit(ranks, width)
    left = min(x[s] - width[s] / 2 for s in x)
    heights = [max((sizes[s][1] for s in row if isinstance(s, str)), default=0.0)
               for row in ranks.rows]  # fmt: skip
    y, top = [], 0.0
    for height in heights:
        y.append(top + height / 2)
        top += height + RANK_GAP
    centres = {name: (x[name] - left, y[rank[name]]) for name in sizes}
    bends = {
        (a, b): [(x[a, r] - left, y[r]) for r in range(rank[a] + 1, rank[b])] for a, b in arrows
    }
    right = max(x[s] + width[s] / 2 for s in x)
    return LayeredDrawing(centres, bends, right - left, top - RANK_GAP)


def _rank(names: Sequence[str], arrows: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Return ranks by the longest path from above; a box without inputs is just above its first
    reader."""
    sources: dict[str, list[str]] = {n: [] for n in names}
    readers: dict[str, list[str]] = {n: [] for n in names}
    for a, b in arrows:
        sources[b].append(a)
        readers[a].append(b)
    rank: dict[str, int] = {}
    for name in names:
        rank[name] = max((rank[s] + 1 for s in sources[name]), default=0)
    for name in names:
        if not sources[name] and readers[name]:
            rank[name] = min(rank[r] for r in readers[name]) - 1
    return rank


def _make_rows(
    names: Iterable[str], arrows: Sequence[tuple[str, str]], rank: Mapping[str, int]
) -> _Ranks:
    ranks = _Ranks([[] for _ in range(max(rank.values()) + 1)])
    for name in names:
        ranks.rows[rank[name]].append(name)
    linked: set[tuple[Slot, Slot]] = set()
    lanes: set[Slot] = set()
    for a, b in arrows:
        between = [(a, row) for row in range(rank[a] + 1, rank[b])]
        path: list[Slot] = [a, *between, b]
        for slot in between:
            if slot not in lanes:
                lanes.add(slot)
                ranks.rows[slot[1]].append(slot)
        for upper, lower in itertools.pairwise(path):
            if (upper, lower) not in linked:
                linked.add((upper, lower))
                ranks.below.setdefault(upper, []).append(lower)
                ranks.above.setdefault(lower, []).append(upper)
    return ranks


def _order(ranks: _Ranks) -> None:
    """Sort each row by the mean position of its neighbours, downwards and upwards in turn."""
    place = {s: float(k) for row in ranks.rows for k, s in enumerate(row)}
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        linked = ranks.above if down else ranks.below
        for row in ranks.rows if down else reversed(ranks.rows):
            mean = {s: _mean([place[n] for n in linked.get(s, ())], place[s]) for s in row}
            row.sort(key=lambda s: (mean[s], isinstance(s, tuple)))
            place.update((s, float(k)) for k, s in enumerate(row))


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _fit(ranks: _Ranks, width: Mapping[Slot, float]) -> dict[Slot, float]:
    """Move every row repeatedly to the positions of its neighbours, keeping order and gaps.

    Lanes are weighted more by lanes and boxes by boxes, so that both run straight.
    """
    x: dict[Slot, float] = {}
    for row in ranks.rows:
        at = 0.0
        for slot in row:
            x[slot] = at + width[slot] / 2
            at += width[slot] + BOX_GAP
        x.update({s: x[s] - at / 2 for s in row})
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for row in ranks.rows if down else reversed(ranks.rows):
            wanted, weight = [], []
            for slot in row:
                links = (ranks.above if down else ranks.below).get(slot, [])
                alike = [isinstance(n, tuple) == isinstance(slot, tuple) for n in links]
                pulls = [ALIKE if same else 1.0 for same in alike]
                total = sum(pulls)
                mean = sum(p * x[n] for p, n in zip(pulls, links, strict=True))
                wanted.append(mean / total if total else x[slot])
                weight.append(total or 0.1)
            x.update(zip(row, _separate(wanted, weight, [width[s] for s in row]), strict=True))
    return x


def _separate(
    wanted: Sequence[float], weight: Sequence[float], width: Sequence[float]
) -> list[float]:
    """Return the positions nearest to the wanted ones, in order and without overlap.

    Least squares with x[i+1] - x[i] >= half their widths plus the gap: pooled adjacent violators.
    """
    shift = [0.0]
    for a, b in itertools.pairwise(width):
        shift.append(shift[-1] + (a + b) / 2 + BOX_GAP)
    pools: list[tuple[float, float, int]] = []  # (mean, weight, count)
    for want, mass, moved in zip(wanted, weight, shift, strict=True):
        mean, count = want - moved, 1
        while pools and pools[-1][0] >= mean:
            other, more, many = pools.pop()
            mean = (mean * mass + other * more) / (mass + more)
            mass, count = mass + more, count + many
        pools.append((mean, mass, count))
    flat = [mean for mean, _, count in pools for _ in range(count)]
    return [f + s for f, s in zip(flat, shift, strict=True)]
