"""How much server time any schedule needs on the toy table, whatever its policy knows.

In: random traces that repeat for ever, a load, p99 <= 150 ms. Out: a lower bound on the time that
batches must take, over the time there is; above 1 the load cannot be sustained by anybody::

    python benchmarks/serving_limit.py --load 0.88 0.9 0.92
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from ortools.linear_solver import pywraplp
from slices import describe_machine

LIMIT_MS, LATE = 150.0, 0.01
LAUNCH_MS, TOKEN_MS, MOST = 4.0, 0.022, 20  # the toy table

Floats = NDArray[np.float64]


class Trace(NamedTuple):
    """Requests of one period, by arrival; the second half of ``again`` is the next period."""

    length: Floats
    arrival_ms: Floats
    period_ms: float

    @classmethod
    def draw(cls, count: int, load: float, seed: int) -> Trace:
        generator = np.random.default_rng(seed)
        length = generator.integers(2, 101, count).astype(np.float64)
        busy_ms = LAUNCH_MS / MOST * count + TOKEN_MS * float(length.sum())  # full, unpadded
        arrival = np.sort(generator.uniform(0, busy_ms / load, count))
        return cls(length, arrival, busy_ms / load)


class Program:
    """The relaxation: choose fractions of batches so that every request is in one.

    A batch's first and last arrival lie at most 150 ms less its own time apart; it costs what the
    table says. Requests answered late, at most 1 in 100, cost their tokens and no launch. Nothing
    keeps two batches apart in time: only the sum of their times counts. Every real schedule is one
    of these, so the least sum is a lower bound. Batches are generated as the duals ask for them;
    duals scaled until no batch is dearer than its cost bound the optimum from below (Farley).
    """

    def __init__(self, trace: Trace) -> None:
        self.trace, count = trace, len(trace.length)
        self._solver = pywraplp.Solver.CreateSolver("GLOP")
        self._sum = self._solver.Objective()
        self._sum.SetMinimization()
        self._covered = [self._solver.Constraint(1, self._solver.infinity()) for _ in range(count)]
        self._late = self._solver.Constraint(-self._solver.infinity(), LATE * count)
        for i, length in enumerate(trace.length):
            self._add([i], LAUNCH_MS + TOKEN_MS * length)
            late = self._add([i], TOKEN_MS * length)
            self._late.SetCoefficient(late, 1)

    def _add(self, members: list[int], cost_ms: float) -> pywraplp.Variable:
        chosen = self._solver.NumVar(0, self._solver.infinity(), "")
        self._sum.SetCoefficient(chosen, float(cost_ms))
        for i in members:
            self._covered[i].SetCoefficient(chosen, 1)
        return chosen

    def bound(self, rounds: int = 400, gap: float = 0.002) -> tuple[float, float]:
        """The proven lower bound and the relaxation's value so far, both over the period."""
        proven, value, period = 0.0, float("inf"), self.trace.period_ms
        for _ in range(rounds):
            self._solver.Solve()
            value = self._sum.Value() / period
            worth = np.array([row.dual_value() for row in self._covered])
            late = self._late.dual_value() * LATE * len(worth)
            found, dearest = self._price(worth)
            proven = max(proven, float(worth.sum() + late) / dearest / period)
            if not found or value - proven < gap or proven > 1 or value < 1 - 10 * gap:
                break
            for members, cost_ms in found:
                self._add(members, cost_ms)
        return proven, value

    def _price(self, worth: Floats) -> tuple[list[tuple[list[int], float]], float]:
        """The best batch to begin with each arrival, and the largest worth over cost of any."""
        length, arrival, period = self.trace
        count = len(length)
        twice = np.concatenate([arrival, arrival + period])
        ends = np.searchsorted(twice, arrival + LIMIT_MS)
        found, dearest = [], 1.0
        for first in range(count):
            those = np.arange(first, ends[first])
            those = those[np.argsort(-worth[those % count], kind="stable")]
            value, size = worth[those % count], length[those % count]
            age = twice[those] - arrival[first]
            tops = np.unique(size)
            best, chosen = 1e-7, None
            for most in range(MOST, 0, -2):
                # Wide enough for one member less, so that sizes may be tried in steps of two.
                room = LIMIT_MS - LAUNCH_MS - TOKEN_MS * max(most - 1, 1) * tops
                fits = (size <= tops[:, None]) & (age <= room[:, None])
                taken = fits & (np.cumsum(fits, axis=1) <= most)
                cost = LAUNCH_MS + TOKEN_MS * taken.sum(1) * tops
                total = (taken * value).sum(1)
                dearest = max(dearest, float((total / cost).max()))
                at = int(np.argmax(total - cost))
                if total[at] - cost[at] > best:
                    best = float(total[at] - cost[at])
                    chosen = ((those[taken[at]] % count).tolist(), float(cost[at]))
            if chosen is not None:
                found.append(chosen)
        return found, dearest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", type=float, nargs="*", default=[0.88, 0.9, 0.92])
    parser.add_argument("--count", type=int, default=300, help="requests in a period")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows = []
    for load in asked.load:
        for seed in range(asked.seeds):
            proven, value = Program(Trace.draw(asked.count, load, seed)).bound()
            rows.append({"load": load, "seed": seed, "proven": proven, "relaxed": value})
            print(rows[-1], "impossible" if proven > 1 else "not ruled out", flush=True)
    if asked.out:
        found = {**describe_machine(), "count": asked.count, "rows": rows}
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
