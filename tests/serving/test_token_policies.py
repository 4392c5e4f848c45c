"""Batches without padding: the order, the cuts, classes and deadlines, what it is worth."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbotx.serving import CostTable, Lazy, Request, Scheduler
from turbotx.serving.native import load_planner
from turbotx.serving.simulation import simulate
from turbotx.serving.token_costs import TokenCosts
from turbotx.serving.token_policies import AgedTokens, FifoTokens, cut
from turbotx.serving.traces import make_trace, poisson_gaps, uniform_lengths

COSTS = TokenCosts.from_rates(4.0, 0.02, 2e-6, 500, 16_384)
PRICES = COSTS.prices(max_batch=32)


def keys(batch):
    return [r.key for r in batch.requests]


def queue(*lengths, **more):
    return [Request(k, n, float(k), **more) for k, n in enumerate(lengths)]


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=9), st.integers(1, 5), st.integers(1, 900)
)
def test_no_cut_of_the_order_is_cheaper(lengths, max_batch, max_tokens):
    length, n = np.array(lengths), len(lengths)
    price = np.linspace(2.0, 1.0, n)
    table = COSTS.prices(max_batch, max_tokens)

    def charge(ends):
        begins = [0, *ends[:-1]]
        return sum(
            price[i] * table.batch_ms(lengths[i:j]) for i, j in zip(begins, ends, strict=True)
        )

    found = cut(length, table, price)
    every = (c for k in range(n) for c in itertools.combinations(range(1, n), k))
    assert found[-1] == n
    assert charge(found) == pytest.approx(min(charge([*c, n]) for c in every))


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60))
def test_python_and_cpp_cut_alike(lengths):
    if load_planner("fill_tokens") is None:
        pytest.skip("no C++ compiler")
    length, price = np.array(lengths), np.linspace(3.0, 1.0, len(lengths))
    compiled = cut(length, PRICES, price)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("turbotx.serving.token_policies.load_planner", lambda name: None)
        assert cut(length, PRICES, price) == compiled


def test_lengths_mix_and_batches_end_at_the_knee():
    batches = AgedTokens().plan(queue(*[5, 500] * 40), 1e4, PRICES)
    assert any({5, 500} <= {r.length for r in b.requests} for b in batches)
    assert all(b.packed and b.tokens == b.padded_tokens <= PRICES.budget for b in batches)
    assert sorted(k for b in batches for k in keys(b)) == list(range(80))


def test_short_ones_first_until_the_others_are_old():
    plan = lambda now_ms: AgedTokens(max_age_ms=3e4).plan(  # noqa: E731
        [Request("long", 500, 0.0), *(Request(k, 10, now_ms) for k in range(3))], now_ms, PRICES
    )
    assert keys(plan(0.0)[0])[:3] == [0, 1, 2]
    assert keys(plan(10_001.0)[0])[0] == "long"


def test_a_single_text_goes_before_an_indexers_rows():
    rows = queue(*[60] * 100, weight=0.01, patient=True)
    single = Request("single", 60, 99.0)
    assert keys(AgedTokens().plan([*rows, single], 100.0, PRICES)[0])[0] == "single"
    nobody = AgedTokens().plan([*rows, replace(single, weight=0.01)], 100.0, PRICES)
    assert "single" not in keys(nobody[0])


def test_deadlines_and_classes():
    plain = queue(*[100] * 200)
    due = Request("due", 100, 199.0, deadline_ms=230.0)
    assert "due" in keys(AgedTokens().plan([*plain, due], 200.0, PRICES)[0])
    assert "due" not in keys(AgedTokens().plan([*plain, replace(due, deadline_ms=math.inf)],
                                               200.0, PRICES)[0])  # fmt: skip
    high = [replace(r, key=f"high {r.key}", priority=1) for r in queue(400, 400)]
    strict = AgedTokens(max_age_ms=1000.0).plan([*plain, *high], 600.0, PRICES)[0]
    assert {"high 0", "high 1"} <= set(keys(strict))  # though others have waited beyond a third


def test_fifo_takes_the_oldest_that_fit():
    batch = FifoTokens().plan(queue(90, 5, 60, 5), 10.0, COSTS.prices(max_tokens=155))[0]
    assert keys(batch) == [0, 1, 2]
    assert keys(FifoTokens().plan(queue(400, 5), 10.0, COSTS.prices(max_tokens=100))[0]) == [0]


def test_a_cancelled_request_leaves_no_hole_and_lazy_counts_tokens():
    scheduler = Scheduler(COSTS, FifoTokens(), Lazy(50.0, 32, 200, packed=True))
    for request in queue(10, 100):
        scheduler.submit(request)
    assert scheduler.next(1.0) is None  # 200 padded tokens, and 110 without padding
    scheduler.submit(Request("more", 90, 2.0))
    scheduler.cancel(0)
    assert scheduler.next(2.0) is None and keys(scheduler.next(60.0)) == [1, "more"]


def test_high_ones_hold_at_three_times_the_capacity():
    lengths = uniform_lengths(5, 500)
    plain = make_trace(poisson_gaps, lengths, rate_per_s=450, count=4000, seed=3)
    high = np.random.default_rng(3).random(4000) < 0.05
    trace = [replace(r, priority=1 if h else -1) for r, h in zip(plain, high, strict=True)]
    outcome = simulate(trace, Scheduler(COSTS, max_age_ms=5000.0, max_batch=32))
    found = outcome.latency_ms[high]
    assert not np.isnan(found).any()
    assert np.percentile(found, 50) < 100 and np.percentile(found, 99) < 250
    assert np.isfinite(outcome.latency_ms[~high]).mean() > 0.2


def test_without_padding_mixed_lengths_wait_less_on_the_same_machine():
    def padded_ms(length, batch):
        return 4 + 0.02 * length * batch + 2e-6 * batch * length**2

    grid = [1, *range(20, 501, 20)]
    padded = CostTable(grid, range(1, 33), [[padded_ms(n, b) for b in range(1, 33)] for n in grid])
    for seed in range(3):
        trace = make_trace(
            poisson_gaps, uniform_lengths(5, 500), rate_per_s=120, count=1500, seed=seed
        )
        now, before = (simulate(trace, Scheduler(c, max_batch=32)) for c in (COSTS, padded))
        assert now.percentile_ms(50) < before.percentile_ms(50)
        assert now.percentile_ms(99) < before.percentile_ms(99)
        assert now.padded_tokens == now.tokens < before.padded_tokens
