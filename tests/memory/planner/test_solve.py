"""The solver for one shape: never below the bound, at it where that is possible, repeatable."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from turbotx.memory.planner import Buffer, Chunk, Lifetime, Placement, Plan, check_plan, lower_bound
from turbotx.memory.planner.greedy import fit
from turbotx.memory.planner.skyline import Boxes, skyline_fit
from turbotx.memory.planner.solve import portfolio, solve

DATA = Path(__file__).parents[3] / "benchmarks" / "data" / "minimalloc"

SPANS = st.lists(
    st.tuples(st.integers(0, 15), st.integers(1, 8), st.integers(0, 40)), min_size=1, max_size=24
)


def problem(spans):
    lifetimes = [Lifetime(begin, begin + length) for begin, length, _ in spans]
    return lifetimes, [64 * units for _, _, units in spans]


def check(lifetimes, sizes, offsets):
    pairs = zip(sizes, lifetimes, strict=True)
    buffers = [Buffer(f"b{i}", nbytes, life) for i, (nbytes, life) in enumerate(pairs)]
    placements = tuple(Placement(b, o) for b, o in zip(buffers, offsets, strict=True))
    peak = max(p.end for p in placements)
    check_plan(Plan((Chunk(0, max(peak, 64)),), placements, peak, lower_bound(buffers)))
    return peak


@settings(max_examples=60, deadline=None)
@given(SPANS)
def test_every_placement_of_the_portfolio_is_safe_and_the_best_is_kept(spans):
    lifetimes, sizes = problem(spans)
    peaks = [check(lifetimes, sizes, offsets) for offsets in portfolio(lifetimes, sizes)]
    found = solve(lifetimes, sizes, max_evaluations=20)
    assert check(lifetimes, sizes, found.offsets) == found.footprint_nbytes <= min(peaks)
    assert found.optimal == (found.footprint_nbytes == found.lower_bound_nbytes)
    assert solve(lifetimes, sizes, max_evaluations=20) == found


def test_search_reaches_a_bound_that_the_portfolio_misses():
    # A dissection of a 12 x 10 rectangle: a perfect packing exists by construction.
    spans = [
        (0, 5, 4), (5, 7, 3), (0, 3, 6), (3, 2, 2), (3, 4, 4), (5, 2, 3),
        (7, 5, 1), (7, 2, 6), (9, 3, 2), (9, 1, 4), (10, 2, 4),
    ]  # fmt: skip
    lifetimes, sizes = problem(spans)
    bound = lower_bound(Buffer("", n, x) for n, x in zip(sizes, lifetimes, strict=True))
    assert bound == 640
    assert solve(lifetimes, sizes).footprint_nbytes == 640


def test_local_search_beats_the_portfolio_on_a_hard_instance():
    rows = [line.split(",") for line in (DATA / "A.csv").read_text().split()[1:]]
    lifetimes = [Lifetime(int(lower), int(upper)) for _, lower, upper, _ in rows]
    sizes = [int(size) for *_, size in rows]
    quick = solve(lifetimes, sizes, max_evaluations=10, time_limit_s=60)
    longer = solve(lifetimes, sizes, max_evaluations=100, time_limit_s=60)
    assert check(lifetimes, sizes, longer.offsets) == longer.footprint_nbytes
    assert longer.footprint_nbytes < quick.footprint_nbytes <= 1.2 * quick.lower_bound_nbytes


def test_greedy_takes_the_tightest_gap():
    lifetimes = [Lifetime(0, 4)] * 3 + [Lifetime(0, 2), Lifetime(2, 4), Lifetime(2, 4)]
    del lifetimes[2]
    sizes = [64, 64, 256, 128, 64]
    # 0 at the bottom; then one that dies early and leaves a gap, then one above it.
    assert fit(lifetimes, sizes, [0, 2, 1]) == [0, 320, 64, 0, 0]
    assert fit(lifetimes, sizes, [0, 2, 1, 3, 4])[4] == 192


def test_the_skyline_fills_the_lowest_ledge_by_preference():
    boxes = Boxes.of([Lifetime(0, 4), Lifetime(0, 2), Lifetime(2, 4)], [10, 5, 7])
    assert skyline_fit(boxes, key=boxes.end - boxes.begin + 0.0) == [0, 10, 10]
    assert skyline_fit(boxes, key=boxes.begin - boxes.end + 0.0) == [7, 0, 0]


def test_one_buffer_and_none():
    assert solve([Lifetime(0, 1)], [64]).offsets == (0,)
    assert solve([], []).offsets == ()
    assert solve([Lifetime(0, 1)], [0]).optimal
