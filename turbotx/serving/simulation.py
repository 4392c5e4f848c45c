"""A server in simulated time: the scheduler's own code, a cost table, a trace.

In: a list of (arrival, length) and a scheduler. Out: every latency, exactly reproducible::

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
    """What a simulated run did. ``latency_ms`` is NaN for a request that was refused."""

    latency_ms: Floats  # answer minus arrival, per request in the trace's order
    wait_ms: Floats  # start minus arrival
    makespan_ms: float  # when the last batch ended, from the first arrival
    batches: int
    tokens: int
    padded_tokens: int

    @property
    def refused(self) -> int:
        """Number of requests that were refused."""
        return int(np.isnan(self.latency_ms).sum())

    @property
    def throughput_per_s(self) -> float:
        """Requests answered per second of simulated time."""
        return (len(self.latency_ms) - self.refused) / self.makespan_ms * 1e3

    def percentile_ms(self, q: float) -> float:
        """Return a percentile of the latency in ms, refused requests aside; q: 0 to 100."""
        return float(np.nanpercentile(self.latency_ms, q))


def simulate(
    trace: Sequence[Request], scheduler: Scheduler, true_costs: BatchCosts | None = None
) -> Outcome:
    """Run a trace, sorted by arrival and with keys 0, 1, 2, …, through one engine.

    ``true_costs`` is what batches really take when it is not what the scheduler believes; then
    every batch refines the scheduler's table.
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
    """Return requests per second if all of them were there from the start: no schedule sustains
    more."""
    return len(lengths) / split(sorted(lengths), costs.dense()).total_ms * 1e3


def toy_table() -> CostTable:
    """Return the stand-in GPU of the simulations: 4 ms + 22 us per padded token, up to 20 x 100."""
    return CostTable.from_function(lambda length, batch: 4 + 0.022 * length * batch, 100, 20)
