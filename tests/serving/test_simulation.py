"""The simulator: exactness on small cases, the bounds, and what the policies are worth."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.exact_schedule import least_mean_latency_ms
from turbotx.serving import POLICIES, CostTable, Lazy, Request, Scheduler
from turbotx.serving.simulation import offline_capacity_per_s, simulate, toy_table
from turbotx.serving.traces import GAPS, LENGTHS, make_trace, poisson_gaps, uniform_lengths

TOY = toy_table()


def every_schedule(trace):
    """Every ordered partition of a trace into batches."""
    if not trace:
        yield []
        return
    for size in range(1, len(trace) + 1):
        for chosen in itertools.combinations(trace, size):
            left = [r for r in trace if r not in chosen]
            for rest in every_schedule(left):
                yield [chosen, *rest]


def mean_latency_ms(schedule, table):
    now, total, count = -math.inf, 0.0, 0
    for batch in schedule:
        start = max(now, max(r.arrival_ms for r in batch))
        now = start + table[max(r.length for r in batch), len(batch)]
        total += sum(now - r.arrival_ms for r in batch)
        count += len(batch)
    return total / count


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 100)), min_size=1, max_size=5))
def test_the_clairvoyant_optimum_equals_brute_force(arrivals):
    trace = [Request(i, n, at) for i, (at, n) in enumerate(sorted(arrivals))]
    table = TOY.dense()
    best = min(mean_latency_ms(s, table) for s in every_schedule(trace))
    assert least_mean_latency_ms(trace, TOY) == pytest.approx(best)


@given(st.integers(0, 10**6), st.sampled_from(sorted(POLICIES)))
def test_no_policy_beats_the_clairvoyant(seed, name):
    trace = make_trace(poisson_gaps, uniform_lengths(2, 100), rate_per_s=800, count=6, seed=seed)
    outcome = simulate(trace, Scheduler(TOY, POLICIES[name]()))
    assert outcome.latency_ms.mean() >= least_mean_latency_ms(trace, TOY) - 1e-9


def test_two_requests_by_hand():
    costs = CostTable.from_function(lambda n, b: 10.0 * b, 5, 2)
    outcome = simulate(
        [Request(0, 5, 0.0), Request(1, 5, 4.0)], Scheduler(costs, POLICIES["fifo"]())
    )
    assert outcome.latency_ms.tolist() == [10.0, 16.0]
    assert outcome.wait_ms.tolist() == [0.0, 6.0]
    assert (outcome.makespan_ms, outcome.batches) == (20.0, 2)


def test_a_lazy_trigger_is_waited_for():
    trigger = Lazy(timeout_ms=7.0, max_batch=9)
    outcome = simulate([Request(0, 5, 0.0)], Scheduler(TOY, trigger=trigger))
    assert outcome.wait_ms.tolist() == [7.0]


def test_the_default_is_near_the_optimum_and_ahead_of_the_paper():
    ratios = {"aged": [], "dp": [], "fifo": []}
    for seed in range(60):
        trace = make_trace(
            poisson_gaps, uniform_lengths(2, 100), rate_per_s=1000, count=8, seed=seed
        )
        best = least_mean_latency_ms(trace, TOY)
        for name, found in ratios.items():
            mean = simulate(trace, Scheduler(TOY, POLICIES[name]())).latency_ms.mean()
            found.append(mean / best)
    aged, paper, fifo = (np.mean(ratios[k]) for k in ("aged", "dp", "fifo"))
    assert aged <= 1.11 < paper < fifo


@pytest.mark.parametrize("gaps", GAPS)
@pytest.mark.parametrize("load", [0.5, 1.0, 4.0])
def test_nobody_waits_beyond_the_age_bound(gaps, load):
    lengths = uniform_lengths(2, 100)
    trace = make_trace(GAPS[gaps], lengths, rate_per_s=756 * load, count=1500, seed=5)
    outcome = simulate(trace, Scheduler(TOY, max_age_ms=400.0))
    assert np.nanmax(outcome.wait_ms) <= 400.0
    assert outcome.refused == 0 or load >= 1
    assert outcome.throughput_per_s >= 0.75 * min(756 * load, 756)


def test_a_wrong_table_is_refined_while_serving():
    believed = CostTable([1, 50, 100], [1, 10, 20], [[5.0] * 3] * 3)
    trace = make_trace(poisson_gaps, uniform_lengths(2, 100), rate_per_s=500, count=3000, seed=0)
    simulate(trace, Scheduler(believed), true_costs=TOY)
    for length, batch in ((20, 8), (60, 12), (95, 12)):
        assert believed.cost_ms(length, batch) == pytest.approx(
            TOY.cost_ms(length, batch), rel=0.25
        )


@pytest.mark.parametrize("gaps", GAPS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_traces_are_seeded_sorted_and_at_rate(gaps, lengths):
    first, again = (
        make_trace(GAPS[gaps], LENGTHS[lengths], rate_per_s=200, count=400, seed=3) for _ in "ab"
    )
    assert first == again
    arrivals = [r.arrival_ms for r in first]
    assert arrivals == sorted(arrivals) and arrivals[0] == 0
    assert 400 * 1e3 / arrivals[-1] == pytest.approx(200, rel=0.15)
    assert all(1 <= r.length <= 500 for r in first)


def test_capacity_is_that_of_full_batches_of_equal_length():
    assert offline_capacity_per_s([100] * 40, TOY) == pytest.approx(20 / (4 + 0.022 * 2000) * 1e3)


def test_the_optimum_refuses_long_traces():
    trace = make_trace(poisson_gaps, uniform_lengths(2, 9), rate_per_s=9, count=13, seed=0)
    with pytest.raises(ValueError, match="12 or less"):
        least_mean_latency_ms(trace, TOY)


@pytest.mark.parametrize("share", [0.05, 0.15])
def test_classes_hold_under_three_times_the_load(share):
    """The high ones are answered nearly as if they were alone, the low ones get what is left."""
    lengths = uniform_lengths(2, 100)
    plain = make_trace(poisson_gaps, lengths, rate_per_s=2300, count=20_000, seed=1)
    chosen = np.random.default_rng(2).random(len(plain)) < share
    trace = [replace(r, priority=1 if high else -1) for r, high in zip(plain, chosen, strict=True)]
    found = simulate(trace, Scheduler(TOY, max_age_ms=5000.0))
    high, low = found.latency_ms[chosen], found.latency_ms[~chosen]
    assert not np.isnan(high).any() and np.nanmax(found.latency_ms) < 5000
    assert np.percentile(high, 99) < 250 and np.percentile(high, 50) < 0.1 * np.nanmedian(low)
    assert found.throughput_per_s > 0.75 * 756  # of the capacity, all of it in full batches
