"""Seeded request traces: arrival times and lengths.

In: a rate, a count, a length distribution, a seed. Out: requests sorted by arrival, keys 0, 1, …::

    make_trace(bursty_gaps, uniform_lengths(2, 100), rate_per_s=600, count=5000, seed=0)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from turbotx.serving.request import Request

Floats = NDArray[np.float64]
Lengths = Callable[[np.random.Generator, int], NDArray[np.int64]]
Gaps = Callable[[np.random.Generator, int], Floats]  # relative gaps with mean about 1


def make_trace(
    gaps: Gaps, lengths: Lengths, *, rate_per_s: float, count: int, seed: int
) -> list[Request]:
    """Return ``count`` requests with a mean rate of exactly ``rate_per_s``, the first at time 0."""
    generator = np.random.default_rng(seed)
    sizes = lengths(generator, count)
    gap = gaps(generator, count)
    arrival_ms = np.cumsum(gap) - gap[0]
    arrival_ms *= count * 1e3 / rate_per_s / gap.sum()
    return [
        Request(key, int(length), float(at))
        for key, (length, at) in enumerate(zip(sizes, arrival_ms, strict=True))
    ]


def poisson_gaps(generator: np.random.Generator, count: int) -> Floats:
    """Return times between arrivals of a Poisson process, of mean 1. float64, (count)."""
    return generator.exponential(1.0, count)


def bursty_gaps(generator: np.random.Generator, count: int) -> Floats:
    """Return gaps of bursts at 1.5 x the mean rate with pauses between (a Markov-modulated
    process), float64 (count,)."""
    gap = generator.exponential(1 / 1.5, count)
    pauses = generator.random(count) < 1 / 100  # bursts of 100 requests on average
    gap[pauses] += generator.exponential(100 / 3, int(pauses.sum()))
    return gap


def diurnal_gaps(generator: np.random.Generator, count: int) -> Floats:
    """Return gaps whose rate swings by +-30 % as a sine, four periods in the trace. float64,
    (count)."""
    phase = np.linspace(0, 8 * np.pi, count)
    gap: Floats = generator.exponential(1.0, count) / (1 + 0.3 * np.sin(phase))
    return gap


def uniform_lengths(least: int, most: int) -> Lengths:
    """Return a uniform distribution over ``least`` to ``most``, inclusive."""
    return lambda generator, count: generator.integers(least, most + 1, count)


def lognormal_lengths(median: float, sigma: float, most: int) -> Lengths:
    """Return a log-normal distribution clipped at ``most``: many short texts, few long ones."""

    def draw(generator: np.random.Generator, count: int) -> NDArray[np.int64]:
        sizes = np.exp(generator.normal(np.log(median), sigma, count)).round()
        return np.clip(sizes, 1, most).astype(np.int64)

    return draw


GAPS: dict[str, Gaps] = {
    "poisson": poisson_gaps, "bursty": bursty_gaps, "diurnal": diurnal_gaps
}  # fmt: skip
LENGTHS: dict[str, Lengths] = {
    "uniform_2_100": uniform_lengths(2, 100),
    "uniform_5_500": uniform_lengths(5, 500),
    "lognormal": lognormal_lengths(40, 0.8, 500),
}
