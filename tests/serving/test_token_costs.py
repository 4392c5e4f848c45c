"""Costs without padding: measured at a few points, fitted, learnt, kept."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.sleep_engine import SleepEngine
from turbotx.serving.cost import CostTableError
from turbotx.serving.engine import Head
from turbotx.serving.measure import LONG_MS, load_or_measure, measure_token_costs
from turbotx.serving.request import Request
from turbotx.serving.scheduler import Scheduler
from turbotx.serving.token_costs import TokenCosts
from turbotx.serving.token_policies import FifoTokens

NODES = [1, 16, 64, 256, 1024, 4096]


def machine(tokens, squares):
    """Launches, GEMMs that are slow for few tokens, attention."""
    return 2.0 + 0.03 * tokens + 1.5 * (1 - math.exp(-tokens / 40)) + 5e-5 * squares


def true_ms(lengths):
    return machine(sum(lengths), sum(n * n for n in lengths))


class Clockwork:
    """An engine whose batches take what the machine says, by a clock of its own."""

    head, packs = Head("embedding"), True

    def __init__(self, monkeypatch):
        self.now_s, self.runs = 0.0, []
        monkeypatch.setattr("turbotx.serving.measure.time.perf_counter", lambda: self.now_s)

    def run(self, rows):
        lengths = [len(row) for row in rows]
        self.runs.append(lengths)
        self.now_s += true_ms(lengths) / 1e3
        return np.zeros((len(rows), 2), np.float32)


def test_a_few_measured_points_tell_any_mixture(monkeypatch, tmp_path):
    engine = Clockwork(monkeypatch)
    costs = measure_token_costs(engine, max_length=512, max_batch=32, max_tokens=8192)
    for lengths in ([5], [500], [5, 500, 17], [100] * 20, [300] * 12):
        assert costs.batch_ms(lengths) == pytest.approx(true_ms(lengths), rel=0.1)
    assert costs.square_ms == pytest.approx(5e-5, rel=0.01)
    assert len({tuple(r) for r in engine.runs}) < 20
    assert all(engine.runs.count(r) == 1 for r in engine.runs if true_ms(r) > LONG_MS)

    path = tmp_path / "costs.json"
    costs.save(path)
    limits = {"max_length": 512, "max_batch": 32, "max_tokens": 8192, "packed": True}
    kept = load_or_measure(path, None, **limits)
    assert kept.batch_ms([5, 500]) == costs.batch_ms([5, 500])
    path.write_text("{}")
    with pytest.raises(CostTableError, match="not a table of token costs"):
        TokenCosts.load(path)
    assert load_or_measure(path, engine, **limits).max_tokens == 8192


def test_what_the_time_does_not_reach_is_extended(monkeypatch):
    engine = Clockwork(monkeypatch)
    costs = measure_token_costs(engine, max_length=512, max_batch=32, budget_ms=150.0)
    assert max(sum(r) for r in engine.runs) < 1024
    assert costs.batch_ms([32] * 128) == pytest.approx(true_ms([32] * 128), rel=0.5)


def test_the_knee_is_where_tokens_stop_getting_cheaper():
    costs = TokenCosts.from_rates(4.0, 0.02, 0.0, 100, 16384)
    knee = costs.prices().knee  # 4 / knee = 2 % of what a token costs in the largest batch
    assert knee == pytest.approx(4 / (0.02 * 0.02), rel=0.5)
    assert costs.prices(max_tokens=1000).budget == 1000
    assert TokenCosts.from_rates(0.0, 0.02, 0.0, 100, 16384).prices().knee == 1


def test_limits_are_infinite_but_for_one_long_sequence():
    prices = TokenCosts.from_rates(1.0, 0.1, 0.0, 100, 400).prices(3, 120)
    assert prices.batch_ms([100]) == pytest.approx(11) == prices.batch_ms([60, 40])
    assert math.isinf(prices.batch_ms([60, 61])) and math.isinf(prices.batch_ms([1] * 4))


def test_what_is_no_table_is_refused():
    with pytest.raises(CostTableError, match="square_ms"):
        TokenCosts([1, 100], [1.0, 2.0], -1.0, 10)
    with pytest.raises(CostTableError, match="max_length 200"):
        TokenCosts([1, 100], [1.0, 2.0], 0.0, 200)
    costs = TokenCosts.from_rates(1.0, 0.1, 0.0, 10, 40)
    with pytest.raises(CostTableError, match="at most 10"):
        costs.batch_ms([11])
    with pytest.raises(CostTableError, match="41 tokens"):
        costs.batch_ms([10, 10, 10, 10, 1])


class Server:
    """A scheduler in simulated time whose batches take what the machine says, give or take."""

    def __init__(self, costs, learns=True):
        self.scheduler = Scheduler(costs, max_age_ms=5000.0, max_batch=32)
        self.rng, self.learns = np.random.default_rng(0), learns
        self.now_ms, self.key = 0.0, 0

    def throughput(self, count):
        """Tokens a second while a hundred requests always wait."""
        begin_ms, done, asked = self.now_ms, 0, 0
        while asked < count:
            while len(self.scheduler) < 100:
                self.key += 1
                length = int(self.rng.integers(5, 501))
                self.scheduler.submit(Request(self.key, length, self.now_ms, patient=True))
            batch = self.scheduler.next(self.now_ms)
            took_ms = true_ms(batch.lengths) * np.clip(self.rng.normal(1, 0.1), 0.5, 2)
            if self.learns:
                self.scheduler.complete(batch, took_ms)
            self.now_ms += took_ms
            done, asked = done + batch.tokens, asked + len(batch.requests)
        return done / (self.now_ms - begin_ms)


def costs_of(factor_of):
    flat = [factor_of(n) * machine(n, 0) for n in NODES]
    return TokenCosts(NODES, flat, 5e-5 * factor_of(NODES[-1]), 512)


@pytest.mark.parametrize("where", [lambda n: True, lambda n: n <= 64, lambda n: n >= 1024],
                         ids=["all", "few", "many"])  # fmt: skip
@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_wrong_costs_are_healed_within_200_requests(factor, where):
    right = Server(costs_of(lambda n: 1.0), learns=False).throughput(2000)
    server = Server(costs_of(lambda n: factor if where(n) else 1.0))
    server.throughput(200)
    assert server.throughput(2000) > 0.96 * right
    costs = server.scheduler.costs
    assert costs.batch_ms([200, 300]) == pytest.approx(true_ms([200, 300]), rel=0.25)


def test_texts_of_one_length_spoil_nothing():
    """What they do not tell apart, tokens and squares, stays as it was, and batches are formed."""
    server = Server(costs_of(lambda n: 1.0))
    costs = server.scheduler.costs
    for k in range(1500):  # one at a time, on a machine that becomes three times as slow
        factor = (1 if k < 300 else 3) * np.clip(server.rng.normal(1, 0.3), 0.5, 2)
        costs.learn([54 + k % 3], true_ms([54]) * factor)
    assert costs.batch_ms([54]) == pytest.approx(3 * true_ms([54]), rel=0.4)
    assert 5e-5 / 3 < costs.square_ms < 15e-5 * 3
    assert costs.prices().knee > 500
    for k in range(10):
        server.scheduler.submit(Request(("more", k), 54, 0.0))
    assert len(server.scheduler.next(0.0).requests) > 1


def test_stale_shapes_are_of_short_sequences():
    costs = costs_of(lambda n: 1.0)
    assert costs.stale(100.0, None) == [
        (0.0, n, b) for n, b in ((1, 1), (16, 1), (32, 2), (32, 8), (32, 32))
    ]  # what takes longer is left out
    for _ in range(3):
        costs.learn([32] * 8, true_ms([32] * 8))
    assert (32, 8) not in [shape[1:] for shape in costs.stale(100.0, None)]


def test_an_engine_that_sleeps_what_they_say():
    engine = SleepEngine(TokenCosts.from_rates(1.0, 0.001, 0.0, 100, 400))
    assert engine.packs and Scheduler(engine.costs, FifoTokens()).packed
