"""The symbolic planner: forms equal longest paths, safe for every shape, monotone, thread-safe."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbotx.memory.planner import Lifetime, check_plan, make_planner
from turbotx.memory.planner import orientation as forms_module
from turbotx.memory.planner.orientation import FormTable, live_forms, orient, prune
from turbotx.memory.planner.plan import Workload, align
from turbotx.memory.planner.symbolic import SymbolicPlanner, solve_orientations

CLASSES = 4


@st.composite
def workloads(draw, max_buffers=20):
    rows = draw(
        st.lists(
            st.tuples(st.integers(0, 12), st.integers(1, 6), st.integers(0, CLASSES - 1)),
            min_size=1,
            max_size=max_buffers,
        )
    )
    rows.append((0, 1, CLASSES - 1))  # so that every class has a size
    return Workload(
        tuple(Lifetime(begin, begin + length) for begin, length, _ in rows),
        tuple(klass for _, _, klass in rows),
        tuple(f"b{i}" for i in range(len(rows))),
    )


def solve(workload, *sizes):
    return SymbolicPlanner(workload, solve_orientations(workload, *sizes))


SIZES = st.lists(st.integers(0, 1 << 34), min_size=CLASSES, max_size=CLASSES)


@settings(max_examples=60, deadline=None)
@given(workloads(), st.data())
def test_forms_are_the_longest_paths_below(workload, data):
    count = len(workload.lifetimes)
    offsets = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    orientation = orient(workload.lifetimes, offsets)
    table = FormTable(orientation, workload.size_class, CLASSES)
    assert table.complete
    classes = np.array(data.draw(SIZES), dtype=np.int64)
    sizes = classes[list(workload.size_class)]
    walked = orientation.offsets(sizes)
    for index, set_id in enumerate(table.of_buffer):
        assert (table.sets[set_id] @ classes).max() == walked[index]
    assert (table.top @ classes).max() == (walked + sizes).max()


@settings(max_examples=40, deadline=None)
@given(workloads(), SIZES, SIZES, st.lists(st.integers(0, 1 << 30), min_size=CLASSES))
def test_larger_sizes_never_need_less(workload, seed, sizes, more):
    planner = solve(workload, seed)
    larger = [size + extra for size, extra in zip(sizes, more, strict=False)]
    check_plan(planner.plan(sizes))
    check_plan(planner.plan(larger))
    small, large = planner.offsets(sizes)[1], planner.offsets(larger)[1]
    assert planner.lower_bound(sizes) <= small <= large


@settings(max_examples=40, deadline=None)
@given(workloads(), SIZES)
def test_with_one_orientation_each_offset_is_monotone(workload, sizes):
    planner = solve(workload, [64] * CLASSES)
    if len(planner.orientations) > 1:
        return
    smaller, _ = planner.offsets(sizes)
    larger, _ = planner.offsets([2 * size + 64 for size in sizes])
    assert all(a <= b for a, b in zip(smaller, larger, strict=True))


@settings(max_examples=40, deadline=None)
@given(workloads(), SIZES)
def test_a_proof_of_optimality_holds(workload, sizes):
    planner = solve(workload, [256] * CLASSES)
    if planner.optimal_everywhere:
        assert planner.offsets(sizes)[1] == planner.lower_bound(sizes)


@settings(max_examples=30, deadline=None)
@given(workloads(), SIZES, SIZES)
def test_walking_gives_what_forms_give(workload, seed, sizes):
    planner = solve(workload, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms_module, "MAX_FORMS", 0)
        walker = solve(workload, seed)
    assert walker.form_count == 0 < planner.form_count
    check_plan(walker.plan(sizes))
    if len(planner.orientations) == 1:
        assert walker.offsets(sizes) == planner.offsets(sizes)


def test_where_no_single_order_will_do_the_best_of_two_is_taken_per_shape():
    rows = [(2, 3, 1), (0, 2, 1), (0, 3, 1), (5, 2, 0), (4, 3, 2), (2, 3, 0)]
    lifetimes = [Lifetime(begin, begin + length) for begin, length, _ in rows]
    workload = Workload(tuple(lifetimes), tuple(klass for *_, klass in rows), tuple("abcdef"))
    units = [(1, 8, 3), (8, 1, 3), (3, 3, 3), (3, 1, 8), (1, 3, 8), (3, 8, 1), (8, 3, 1)]
    samples = [[64 * unit for unit in row] for row in units]
    planner = solve(workload, samples[0], samples)
    assert len(planner.orientations) == 2
    assert all(planner.offsets(sizes)[1] == planner.lower_bound(sizes) for sizes in samples)
    alone = [FormTable(o, workload.size_class, 3).top for o in planner.orientations]
    for top in alone:  # each is worse than the pair somewhere
        assert any((top @ np.array(s)).max() > planner.lower_bound(s) for s in samples)
    for sizes in samples:
        check_plan(planner.plan(sizes))


def test_pruning_keeps_what_can_be_largest():
    rows = np.array([[1, 0], [0, 2], [1, 0], [0, 1], [0, 0]])
    assert prune(rows).tolist() == [[0, 2], [1, 0]]


def test_live_forms_count_each_launch():
    lifetimes = [Lifetime(0, 2), Lifetime(1, 3), Lifetime(2, 3)]
    assert live_forms(lifetimes, [0, 1, 0], 2).tolist() == [[1, 1]]
    assert live_forms([], [], 2).tolist() == [[0, 0]]


def test_threads_may_share_a_planner_and_get_the_same_plans():
    random = np.random.default_rng(0)
    begins = random.integers(0, 40, 60)
    lifetimes = [Lifetime(int(b), int(b) + 1 + i % 5) for i, b in enumerate(begins)]
    size_class = [i % CLASSES for i in range(60)]
    names = [f"b{i}" for i in range(60)]
    shapes = [random.integers(0, 1 << 22, CLASSES).tolist() for _ in range(40)]
    for kind in ("symbolic", "greedy"):
        planner = make_planner(kind, lifetimes, size_class, names, shapes[0])
        expected = [planner.offsets(shape) for shape in shapes]
        results = [None] * 6

        def work(slot, planner=planner, results=results):
            results[slot] = [planner.offsets(shape) for shape in shapes]

        _run(work, 6)
        assert all(result == expected for result in results)


def test_threads_may_share_a_chunked_planner_and_every_plan_is_safe():
    lifetimes = [Lifetime(i, i + 3) for i in range(20)]
    names = [f"b{i}" for i in range(20)]
    planner = make_planner("chunked", lifetimes, [i % 2 for i in range(20)], names, [64, 64])
    plans = []

    def work(slot):
        for step in range(15):
            plans.append(planner.plan([(slot + 1) * 600_000, step * 300_000]))

    _run(work, 4)
    assert len(plans) == 60
    for plan in plans:
        check_plan(plan)


def _run(work, count):
    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def test_align_rounds_up():
    assert [align(n) for n in (0, 1, 64, 65)] == [0, 64, 64, 128]
