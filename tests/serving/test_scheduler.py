"""Policies, triggers and the scheduler: what runs, when, and what is refused."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbotx.serving import (
    POLICIES,
    Aged,
    CostTable,
    Fifo,
    Hungry,
    Lazy,
    Overloaded,
    PaperDP,
    Request,
    Scheduler,
    Single,
    SortAndSlice,
)
from turbotx.serving.cost import CostTableError
from turbotx.serving.simulation import toy_table

TOY = toy_table()


def queue(*lengths, **more):
    return [Request(i, n, float(i), **more) for i, n in enumerate(lengths)]


def keys(batch):
    return sorted(r.key for r in batch.requests)


@pytest.mark.parametrize("name", POLICIES)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 7))
def test_every_request_runs_exactly_once(name, lengths, max_batch):
    scheduler = Scheduler(TOY, POLICIES[name](), max_batch=max_batch, max_batch_tokens=300)
    for request in queue(*lengths):
        scheduler.submit(request)
    done = []
    while batch := scheduler.next(now_ms=100.0):
        assert len(batch.requests) <= max_batch
        assert batch.padded_tokens <= 300 or len(batch.requests) == 1
        assert batch.length == max(r.length for r in batch.requests)
        done += [r.key for r in batch.requests]
    assert sorted(done) == list(range(len(lengths)))
    assert scheduler.backlog_ms == 0


def test_fifo_pads_what_came_first():
    batch = Fifo().plan(queue(5, 90, 7), 10.0, TOY.dense(max_batch=2))[0]
    assert keys(batch) == [0, 1] and batch.length == 90


def test_single_takes_one():
    assert keys(Single().plan(queue(5, 90), 10.0, TOY.dense())[0]) == [0]


def test_sort_and_slice_sorts_within_its_window():
    batches = SortAndSlice(batches=2).plan(queue(9, 1, 8, 2, 3), 10.0, TOY.dense(max_batch=2))
    assert [keys(b) for b in batches] == [[1, 3], [0, 2]]


def test_paper_dp_runs_its_whole_plan_before_it_looks_again():
    scheduler = Scheduler(TOY, PaperDP())
    for request in queue(100, 2, 3):
        scheduler.submit(request)
    assert keys(scheduler.next(5.0)) == [1, 2]
    scheduler.submit(Request(9, 2, 6.0))
    assert scheduler.wake_ms(6.0) == 6.0
    assert keys(scheduler.next(6.0)) == [0]
    assert keys(scheduler.next(7.0)) == [9]


def test_aged_runs_the_cheap_many_first_and_the_old_later():
    requests = [Request("old", 100, 0.0), Request("a", 2, 99.0), Request("b", 3, 99.0)]
    assert keys(Aged().plan(requests, 1.0, TOY.dense())[0]) == ["a", "b"]
    assert keys(Aged().plan(requests, 100.0, TOY.dense())[0]) == ["old"]


def test_a_near_deadline_and_a_priority_come_first():
    short = [Request("a", 2, 0.0), Request("b", 3, 0.0)]
    due = Request("due", 100, 0.0, deadline_ms=1.0)
    later = Request("later", 100, 0.0, deadline_ms=1e6)
    vip = Request("vip", 100, 0.0, priority=1)
    plan = lambda *r: keys(Aged().plan([*short, *r], 0.0, TOY.dense())[0])  # noqa: E731
    assert plan(later) == ["a", "b"]
    assert plan(due) == ["due"]
    assert plan(vip) == ["vip"]


def test_a_third_of_the_age_bound_puts_the_oldest_first_whatever_the_priority():
    requests = [Request("old", 100, 0.0), Request("vip", 2, 49.0, priority=5)]
    patient = Aged(max_age_ms=200.0)
    assert keys(patient.plan(requests, 50.0, TOY.dense())[0]) == ["vip"]
    assert keys(Aged(max_age_ms=150.0).plan(requests, 50.0, TOY.dense())[0]) == ["old"]


def test_under_overload_classes_are_strict():
    low = [Request(f"low {i}", 50, float(i), priority=-1) for i in range(60)]
    high = [Request("a", 60, 69.0, priority=1), Request("b", 2, 69.0, priority=1)]
    plan = lambda age_ms: Aged(max_age_ms=age_ms).plan([*low, *high], 70.0, TOY.dense())  # noqa: E731
    (first,) = plan(300.0)  # the others fill it up, the oldest first
    assert keys(first) == ["a", "b", *(f"low {i}" for i in range(5))] and first.length == 60
    assert first.cost_ms == TOY.cost_ms(60, 7) <= 2 * TOY.cost_ms(60, 2)
    assert sum(len(batch.requests) for batch in plan(1e6)) == 62


def test_a_class_is_admitted_longer_than_the_one_below_it():
    scheduler = Scheduler(TOY, max_age_ms=300.0)
    admitted = dict.fromkeys((-1, 0, 1), 0)
    for priority in admitted:
        with contextlib.suppress(Overloaded):
            for i in range(1000):
                scheduler.submit(Request((priority, i), 50, 0.0, priority=priority))
                admitted[priority] += 1
    low, normal, high = admitted.values()
    assert 30 < low < 60 and normal == pytest.approx(low, abs=1)
    assert high == pytest.approx(low, abs=1)


def test_a_coalesced_request_takes_the_higher_class_and_the_later_deadline():
    scheduler = Scheduler(TOY)
    scheduler.submit(Request("a", 5, 0.0, deadline_ms=10.0, priority=-1))
    scheduler.raise_to("a", 5.0, 1)
    assert scheduler.waiting == [Request("a", 5, 0.0, deadline_ms=10.0, priority=1)]
    scheduler.raise_to("a", 20.0, 0)
    assert scheduler.waiting == [Request("a", 5, 0.0, deadline_ms=20.0, priority=1)]
    scheduler.raise_to("gone", 20.0, 0)


def test_what_is_overdue_leaves_the_queue():
    scheduler = Scheduler(TOY)
    for key, deadline_ms in (("a", 10.0), ("b", 30.0), ("c", math.inf)):
        scheduler.submit(Request(key, 5, 0.0, deadline_ms=deadline_ms))
    assert [r.key for r in scheduler.overdue(20.0)] == ["a"]
    assert keys(scheduler.next(20.0)) == ["b", "c"]


def test_very_old_queues_do_not_overflow():
    requests = [Request(i, 5, -1e300) for i in range(3)] + [Request("vip", 5, 0.0, priority=900)]
    assert len(Aged().plan(requests, 0.0, TOY.dense())[0].requests) == 4


def test_lazy_waits_for_time_size_or_tokens():
    lazy = Lazy(timeout_ms=10.0, max_batch=3, max_tokens=100)
    assert lazy.ready_ms(queue(5, 5), 2.0) == 10.0
    assert lazy.ready_ms(queue(5, 5, 5), 2.0) == 2.0
    assert lazy.ready_ms(queue(50, 5), 2.0) == 2.0
    scheduler = Scheduler(TOY, trigger=lazy)
    scheduler.submit(Request("a", 5, 0.0))
    assert scheduler.next(9.9) is None and scheduler.wake_ms(9.9) == 10.0
    assert keys(scheduler.next(10.0)) == ["a"]


def test_hungry_never_waits_and_an_empty_queue_never_wakes():
    scheduler = Scheduler(TOY, trigger=Hungry())
    assert scheduler.next(0.0) is None and math.isinf(scheduler.wake_ms(0.0))
    scheduler.submit(Request("a", 5, 0.0))
    assert keys(scheduler.next(0.0)) == ["a"]


def test_a_cancelled_request_leaves_queue_and_plan():
    scheduler = Scheduler(TOY, PaperDP())
    for request in queue(2, 100, 99, 3):
        scheduler.submit(request)
    assert keys(scheduler.next(0.0)) == [0, 3]
    assert scheduler.cancel(1) and not scheduler.cancel(1) and not scheduler.cancel(0)
    batch = scheduler.next(0.0)
    assert keys(batch) == [2] and batch.length == 99
    assert scheduler.next(0.0) is None


def test_full_queues_refuse_with_a_time_to_return():
    scheduler = Scheduler(TOY, max_queue=2)
    for request in queue(5, 5):
        scheduler.submit(request)
    with pytest.raises(Overloaded, match="2 requests wait") as caught:
        scheduler.submit(Request("c", 5, 0.0))
    assert caught.value.retry_after_ms >= 1
    slow = Scheduler(TOY, max_age_ms=30.0)
    for request in queue(*[100] * 5):
        slow.submit(request)
    with pytest.raises(Overloaded, match="about 12 ms of work"):
        slow.submit(Request(5, 100, 0.0))


def test_those_who_waited_too_long_are_given_back():
    scheduler = Scheduler(TOY, max_age_ms=30.0)
    for request in queue(5, 5):
        scheduler.submit(request)
    assert scheduler.expire(29.0) == []
    assert [r.key for r in scheduler.expire(30.0)] == [0] and len(scheduler) == 1


def test_bad_submissions():
    scheduler = Scheduler(TOY)
    scheduler.submit(Request("a", 5, 0.0))
    with pytest.raises(ValueError, match="already waits"):
        scheduler.submit(Request("a", 5, 0.0))
    with pytest.raises(CostTableError, match="covers 1 to 100"):
        scheduler.submit(Request("b", 101, 0.0))


def test_completed_batches_refine_the_costs():
    costs = CostTable([1, 100], [1, 20], [[1, 1], [1, 1]])
    scheduler = Scheduler(costs)
    for key in range(400):
        scheduler.submit(Request(key, 100, 0.0))
        scheduler.complete(scheduler.next(0.0), 3.0)
    assert costs.cost_ms(100, 1) == pytest.approx(3.0, rel=0.05)
