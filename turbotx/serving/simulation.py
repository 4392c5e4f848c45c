"""Simulation: the real scheduler in simulated time, with a cost table as the engine.

In: a trace of requests and a scheduler. Out: every request's latency, reproducible exactly::

    trace = make_trace(poisson_gaps, uniform_lengths(2, 100), rate_per_s=600, count=99, seed=0)
    simulate(trace, Scheduler(toy_table())).latency_ms     # one per request, in the trace's order
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from turbotx.serving.cost import CostTable
from turbotx.serving.plan import split
from turbotx.serving.request import Request
from turbotx.serving.scheduler import Overloaded, Scheduler
from turbotx.serving.token_costs import BatchCosts

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """Result of a simulation. ``latency_ms`` is NaN for refused requests."""

    latency_ms: Floats  # (requests,): end of the batch minus arrival, in the trace's order
    wait_ms: Floats  # (requests,): start of the batch minus arrival
    makespan_ms: float  # from the first arrival to the end of the last batch
    batches: int
    tokens: int
    padded_tokens: int

    @property
    def refused(self) -> int:
        """Number of refused requests."""
        return int(np.isnan(self.latency_ms).sum())

    @property
    def throughput_per_s(self) -> float:
        """Answered requests per second of simulated time."""
        return (len(self.latency_ms) - self.refused) / self.makespan_ms * 1e3

    def percentile_ms(self, q: float) -> float:
        """Return a percentile of the latency in ms, without refused requests; q: 0 to 100."""
        return float(np.nanpercentile(self.latency_ms, q))


def simulate(
    trace: Sequence[Request], scheduler: Scheduler, true_costs: BatchCosts | None = None
) -> Outcome:
    """Run a trace, sorted by arrival and with keys 0, 1, 2, …, through one engine.

    true_costs: the batches' real cost if it differs from the scheduler's table, which is then
    refined by every batch.
    """
    latency = np.full(len(trace), math.nan)
    wait = np.full(len(trace), math.nan)
    truth = true_costs or scheduler.costs
    now_ms, coming = trace[0].arrival_ms, 0
    batches = tokens = padded = 0
    while coming < len(trace) or len(scheduler):
        while coming < len(trace) and trace[coming].arrival_ms <= now_ms:
            with contextlib.suppress(Overloaded):
                scheduler.submit(trace[coming])
            coming += 1
        scheduler.expire(now_ms)
        batch = scheduler.next(now_ms)
        if batch is None:
            arrival = trace[coming].arrival_ms if coming < len(trace) else math.inf
            now_ms = min(arrival, scheduler.wake_ms(now_ms))
            if math.isinf(now_ms):
                break
            continue
        took_ms = truth.batch_ms(batch.lengths)
        for request in batch.requests:
            wait[cast(int, request.key)] = now_ms - request.arrival_ms
        now_ms += took_ms
        for request in batch.requests:
            latency[cast(int, request.key)] = now_ms - request.arrival_ms
        batches, tokens = batches + 1, tokens + batch.tokens
        padded += batch.padded_tokens
        if true_costs is not None:
            scheduler.complete(batch, took_ms)
    return Outcome(latency, wait, now_ms - trace[0].arrival_ms, batches, tokens, padded)


def offline_capacity_per_s(lengths: Sequence[int], costs: CostTable) -> float:
    """Return requests per second if all arrive at the start: an upper bound of any schedule."""
    return len(lengths) / split(sorted(lengths), costs.dense()).total_ms * 1e3


def toy_table() -> CostTable:
    """Return a simulated GPU's costs: 4 ms + 22 us per padded token, up to 20 x 100."""
    return CostTable.from_function(lambda length, batch: 4 + 0.022 * length * batch, 100, 20)
