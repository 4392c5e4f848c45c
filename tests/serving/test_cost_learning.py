"""Costs that were measured wrong heal, also those of shapes that are never run."""

from __future__ import annotations

import numpy as np
import pytest

from turbotx.serving import cost_learning
from turbotx.serving.cost import CostTable
from turbotx.serving.request import Request
from turbotx.serving.scheduler import Scheduler

LENGTHS, BATCHES = np.array([1, 16, 32, 64, 100]), np.array([1, 4, 16, 20])
TOKENS = np.multiply.outer(LENGTHS, BATCHES)
LONG = np.multiply.outer(LENGTHS >= 64, BATCHES >= 16)
SHORT = np.multiply.outer(LENGTHS <= 16, BATCHES >= 16)


def toy(length, batch):
    return 4 + 0.022 * length * batch


def crooked(length, batch):
    """Not of the form that is fitted: a step at 32 tokens, and batches of 16 at a discount."""
    return (4 + 0.02 * length * batch + 4e-4 * length**2 * batch + 9 * (length > 32)) * (
        0.8 if batch >= 16 else 1.0
    )  # fmt: skip


class Server:
    """A scheduler in simulated time whose batches take what ``truth`` says."""

    def __init__(self, grid, truth, lengths, learns=True):
        self.table = CostTable(LENGTHS, BATCHES, grid)
        self.scheduler = Scheduler(self.table, max_age_ms=5000.0)
        self.truth, self.lengths, self.learns = truth, lengths, learns
        self.rng = np.random.default_rng(0)
        self.now_ms, self.key = 0.0, 0

    def ask(self):
        self.key += 1
        self.scheduler.submit(Request(self.key, int(self.rng.choice(self.lengths)), self.now_ms))

    def run(self):
        batch = self.scheduler.next(self.now_ms)
        noise = np.clip(self.rng.normal(1, 0.1), 0.5, 2)
        took_ms = self.truth(batch.length, len(batch.requests)) * noise
        if self.learns:
            self.scheduler.complete(batch, took_ms)
        self.now_ms += took_ms
        return len(batch.requests)

    def throughput(self, count):
        """Requests a second while a hundred always wait."""
        begin_ms, done = self.now_ms, 0
        while done < count:
            while len(self.scheduler) < 100:
                self.ask()
            done += self.run()
        return done / (self.now_ms - begin_ms)


def grid_of(truth):
    return np.array([[truth(n, b) for b in BATCHES] for n in LENGTHS])


@pytest.mark.parametrize("quiet", [0, 200], ids=["busy", "quiet-first"])
@pytest.mark.parametrize("lengths", [[100], list(range(2, 101))], ids=["alike", "mixed"])
@pytest.mark.parametrize("where", [TOKENS > 0, LONG, SHORT], ids=["all", "long", "short"])
@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_a_wrong_table_is_healed_within_200_requests(factor, where, lengths, quiet):
    grid = grid_of(toy)
    right = Server(grid, toy, lengths, learns=False).throughput(2000)
    server = Server(np.where(where, factor * grid, grid), toy, lengths)
    for _ in range(quiet):  # one at a time: only single requests are seen
        server.ask()
        server.run()
    server.throughput(200)
    assert server.throughput(2000) > 0.96 * right


@pytest.mark.parametrize("truth", [toy, crooked])
def test_learning_costs_a_right_table_nothing(truth):
    grid, lengths = grid_of(truth), list(range(2, 101))
    right = Server(grid, truth, lengths, learns=False).throughput(4000)
    assert Server(grid, truth, lengths).throughput(4000) > 0.96 * right


def test_fresh_nodes_are_not_moved():
    grid = grid_of(toy)
    trust = np.where(TOKENS % 3 == 1, 1.0, 0.0)
    before = grid.copy()
    cost_learning.follow(grid, trust, -0.7)
    cost_learning.relax(grid, trust, LENGTHS, BATCHES)
    cost_learning.keep_monotone(grid, trust)
    assert (grid[trust == 1] == before[trust == 1]).all()
    assert (grid[trust == 0] <= before[trust == 0]).all() and (grid != before).any()
    assert (np.diff(grid, axis=0) >= 0).all() and (np.diff(grid, axis=1) >= 0).all()
