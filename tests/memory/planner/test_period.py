"""Periods: layers that repeat are found, and placements of a few serve all of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from turbotx.memory.planner.choose import choose_orientations
from turbotx.memory.planner.orientation import live_forms
from turbotx.memory.planner.period import Period, find_period, repeated
from turbotx.memory.planner.plan import Buffer, Lifetime, Workload, lower_bound
from turbotx.memory.planner.solve import optima
from turbotx.memory.planner.symbolic import SymbolicPlanner, solve_orientations

BLOOM = ((0, 5, 1), (1, 3, 4), (3, 2, 1), (4, 6, 1), (5, 2, 3), (6, 2, 1), (7, 2, 1))
"""Bloom's layer, 8 launches: begin, launches alive, size; buffers change places from one layer to
the next wherever the bound is met."""


T5 = ((0, 5, 0), (1, 2, 4), (2, 2, 0), (3, 6, 0), (4, 2, 2), (5, 2, 0), (6, 2, 0))
T5_BEGIN = ((0, 8, 0), (0, 3, 0), (2, 3, 2), (4, 2, 0), (5, 2, 0))
"""T5's layer, 7 launches, and what is before the first: begin, launches alive, which of sizes."""


CODEGEN = ((3, 3, 3), (4, 2, 0), (4, 2, 0), (5, 2, 0), (6, 9, 0), (7, 2, 4), (8, 2, 0), (9, 8, 0))
"""CodeGen's layer, 7 launches: begin, launches alive, which of sizes. The first reads other buffers
than those between layers, and every layer a table that was made at the start."""


def codegen_sizes(batch: int, seq: int) -> list[int]:
    """Bytes of 64 channels, a table, a mask, q, k and v, 256 channels."""
    tokens = batch * seq
    return [256 * tokens, 32 * seq, 4 * tokens * seq, 768 * tokens, 1024 * tokens]


def t5_sizes(batch: int, seq: int) -> list[int]:
    """Bytes of 64 channels, a mask, q, k and v, four heads' relative positions, 128 channels."""
    return [256 * batch * seq, batch * seq, 768 * batch * seq, 16 * seq * seq, 512 * batch * seq]


def layers(count: int, unit: int = 512) -> tuple[list[Lifetime], list[int]]:
    """A mask that all layers read, and the layers."""
    end = 8 * count + 8
    lifetimes, sizes = [Lifetime(0, end)], [8 * unit]
    for k in range(count):
        for begin, length, size in BLOOM:
            at = 1 + 8 * k + begin
            lifetimes.append(Lifetime(at, at + length))
            sizes.append(size * unit)
    return lifetimes, sizes


def check(lifetimes: Sequence[Lifetime], sizes: Sequence[int], offsets: Sequence[int]) -> None:
    for i, a in enumerate(lifetimes):
        for j in range(i):
            b = lifetimes[j]
            if a.begin < b.end and b.begin < a.end:
                assert offsets[i] + sizes[i] <= offsets[j] or offsets[j] + sizes[j] <= offsets[i]


def test_the_shortest_period_is_found() -> None:
    lifetimes, sizes = layers(12)
    assert find_period(lifetimes, sizes) == Period(1, 7, 8, 12)
    assert find_period(*layers(5)) is None  # too few to leave any out
    assert find_period([], []) is None
    sizes[40] += 512  # one layer is another one: what stands before it or behind it is left
    found = find_period(lifetimes, sizes)
    assert found is None or found.repeats < 12


@pytest.mark.parametrize("count", [6, 7, 12, 31, 48])
def test_a_few_layers_serve_all(count: int) -> None:
    lifetimes, sizes = layers(count)
    period = find_period(lifetimes, sizes)
    assert period is not None
    seen: list[int] = []

    def place(fewer: Sequence[Lifetime], of: Sequence[int]) -> Iterator[list[int]]:
        seen.append(len(of))
        yield from optima(fewer, of)

    made = list(repeated(lifetimes, sizes, period, place))
    assert made and max(seen) <= 1 + 5 * len(BLOOM)
    for offsets in made:
        check(lifetimes, sizes, offsets)


def test_a_placement_that_cannot_be_repeated_is_left_out() -> None:
    lifetimes, sizes = layers(12)
    period = find_period(lifetimes, sizes)
    assert period is not None
    at_zero = lambda fewer, of: iter([[0] * len(of)])  # noqa: E731
    assert not list(repeated(lifetimes, sizes, period, at_zero))


@pytest.mark.parametrize("count", [2, 12, 24, 48])
def test_plans_of_equal_layers_are_at_the_bound(count: int) -> None:
    lifetimes, sizes = layers(count)
    kinds = sorted(set(sizes))
    names = tuple(map(str, range(len(sizes))))
    workload = Workload(tuple(lifetimes), tuple(map(kinds.index, sizes)), names)
    planner = SymbolicPlanner(workload, solve_orientations(workload, kinds, [kinds]))
    offsets, peak = planner.offsets(kinds)
    check(lifetimes, sizes, offsets)
    buffers = [Buffer("", s, x) for x, s in zip(lifetimes, sizes, strict=True)]
    assert peak == lower_bound(buffers)


def t5_buffers(count: int) -> list[tuple[int, int, int]]:
    end = 7 * count + 3
    found = [(1, end - 6, 1), (3, end - 8, 3), *T5_BEGIN]
    found += [(6 + 7 * k + at, n, kind) for k in range(count) for at, n, kind in T5]
    return sorted(found[:-4])


def codegen_buffers(count: int) -> list[tuple[int, int, int]]:
    found = [(0, 10, 0), (0, 8, 0), (2, 7 * count - 3, 2)]
    found += sorted(((1, 4 + 7 * k, 1) for k in range(count)), key=lambda x: str(x[1]))
    return found + [(7 * k + at, n, kind) for k in range(count) for at, n, kind in CODEGEN]


@pytest.mark.parametrize("count", [12, 24, 48])
@pytest.mark.parametrize(
    ("buffers", "sizes_at"), [(t5_buffers, t5_sizes), (codegen_buffers, codegen_sizes)]
)
def test_plans_are_at_the_bound_where_a_buffer_grows_otherwise_than_those_of_layers(
    buffers, sizes_at, count: int
) -> None:
    found, end = buffers(count), 7 * count + 3
    lifetimes = [Lifetime(at, min(at + n, end)) for at, n, _ in found]
    kinds = [kind for _, _, kind in found]
    workload = Workload(tuple(lifetimes), tuple(kinds), tuple(map(str, range(len(kinds)))))
    shapes = ((8, 128), (1, 16), (1, 128), (4, 64), (16, 512), (1, 512))
    given = [sizes_at(*shape) for shape in shapes]
    planner = SymbolicPlanner(workload, solve_orientations(workload, given[0], given))
    for shape in ((1, 1), (2, 17), (7, 2), (3, 40), (1, 384), (16, 64)):
        sizes = sizes_at(*shape)
        assert planner.offsets(sizes)[1] == planner.lower_bound(sizes), shape


def test_any_graph_is_planned_without_overlaps() -> None:
    draw = random.Random(0)
    for _ in range(20):
        layer = [(draw.randrange(4), draw.randint(1, 9), draw.randint(1, 4)) for _ in range(4)]
        lifetimes, sizes = [], []
        for k in range(20):
            for begin, length, size in layer:
                lifetimes.append(Lifetime(4 * k + begin, 4 * k + begin + length))
                sizes.append(512 * size)
        for _ in range(3):  # and some that belong to no layer
            begin = draw.randrange(60)
            lifetimes.append(Lifetime(begin, begin + draw.randint(1, 40)))
            sizes.append(512 * draw.randint(1, 6))
        kinds = sorted(set(sizes))
        names = tuple(map(str, range(len(sizes))))
        workload = Workload(tuple(lifetimes), tuple(map(kinds.index, sizes)), names)
        live = live_forms(workload.lifetimes, workload.size_class, workload.class_count)
        none = np.zeros((len(kinds), 0), dtype=np.int64)
        for one in choose_orientations(workload, np.array(kinds), none, live):
            offsets = one.offsets(np.array(sizes)[:, None])[:, 0].tolist()
            check(lifetimes, sizes, offsets)
