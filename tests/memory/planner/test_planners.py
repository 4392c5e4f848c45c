"""Planners against the checker, over random lifetimes, classes and streams of shapes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbotx.memory.planner import Lifetime, PlanError, check_plan, make_planner

KINDS = ("symbolic", "chunked", "greedy")


@st.composite
def workloads(draw, max_buffers=18, max_classes=5):
    count = draw(st.integers(0, max_buffers))
    classes = draw(st.integers(1, max_classes))
    spans = draw(
        st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), min_size=count, max_size=count)
    )
    lifetimes = [Lifetime(begin, begin + length) for begin, length in spans]
    size_class = draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
    return lifetimes, size_class, [f"b{i}" for i in range(count)], classes


def sizes(classes):
    one = st.one_of(st.just(0), st.integers(0, 2_000), st.integers(0, 5_000_000_000))
    return st.lists(one, min_size=classes, max_size=classes)


@settings(max_examples=60, deadline=None)
@given(st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_any_shape_of_any_workload_is_placed_safely(kind, data):
    lifetimes, size_class, names, classes = data.draw(workloads())
    planner = make_planner(kind, lifetimes, size_class, names, data.draw(sizes(classes)))
    for shape in data.draw(st.lists(sizes(classes), min_size=1, max_size=4)):
        plan = planner.plan(shape)
        check_plan(plan)
        if kind != "chunked":  # whose chunks depend on the plans before
            offsets, footprint_nbytes = planner.offsets(shape)
            assert [p.offset for p in plan.placements] == list(offsets)
            assert plan.peak_nbytes == footprint_nbytes
            assert footprint_nbytes >= plan.lower_bound_nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_no_buffers_need_no_memory(kind):
    planner = make_planner(kind, [], [], [], [])
    assert planner.offsets([]) == ([], 0)
    check_plan(planner.plan([]))


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_beyond_two_to_the_31(kind):
    planner = make_planner(kind, [Lifetime(0, 2), Lifetime(1, 3)], [0, 0], ["a", "b"], [64])
    offsets, footprint_nbytes = planner.offsets([3 << 32])
    assert min(offsets) == 0
    assert max(offsets) >= 3 << 32
    assert footprint_nbytes >= 6 << 32


def test_mistakes_are_named():
    life = [Lifetime(0, 1)]
    with pytest.raises(PlanError, match="no planner is called 'best'"):
        make_planner("best", life, [0], ["a"], [64])
    with pytest.raises(PlanError, match="equally long"):
        make_planner("greedy", life, [0, 0], ["a"], [64])
    with pytest.raises(PlanError, match="at least one launch"):
        Lifetime(3, 3)
    for kind in KINDS:
        planner = make_planner(kind, life, [0], ["a"], [64])
        with pytest.raises(PlanError):
            planner.offsets([-1])
        with pytest.raises(PlanError):
            planner.offsets([])
