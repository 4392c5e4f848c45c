"""Cost learning: updates the cost table from executed batches, also for shapes that did not run.

In: a cost grid, the freshness of each node, the step that fresh nodes made. Out: the same grid with
its stale nodes moved: a shape that looks expensive is never scheduled, hence never measured::

    follow(grid_ms, trust, log_step=-0.4)       # stale nodes decrease as the fresh ones did
    relax(grid_ms, trust, tokens, lengths)      # and approach a fit through the fresh ones
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]

FORGET = 0.98  # factor of a node's trust, per batch elsewhere
FRESH = 0.5  # trust from which a node counts as known
PULL = 0.25  # step towards the fitted estimate, per call
EXPLORE = 0.93  # factor of a stale cost if nothing can be fitted, per call
SPREAD = 4.0  # fresh nodes must span this factor of tokens to fit a slope


def follow(grid_ms: Table, trust: Table, log_step: float) -> None:
    """Move stale nodes, in place, by the mean relative step of the fresh ones.

    If the machine was busy during the measurement, all costs are too high by a similar factor.
    """
    grid_ms *= np.exp(log_step * (1 - trust) / max(trust.sum(), 1.0))


def relax(grid_ms: Table, trust: Table, lengths: NDArray[np.int64], batches: NDArray[np.int64]) -> None:  # fmt: skip  # noqa: E501
    """Move stale nodes, in place, towards a + b * tokens (+ c * length * tokens), fitted to fresh
    ones.

    The fit minimizes squared relative errors. If the fresh nodes are too few or too similar for a
    fit, stale costs are lowered a little per call until their shape is scheduled. An estimate that
    is too low corrects itself: its shape is then scheduled and measured.
    """
    tokens = np.multiply.outer(lengths, batches).astype(np.float64)
    fresh, stale = trust >= FRESH, trust < FRESH
    known = tokens[fresh]
    if fresh.sum() < 3 or known.max() < SPREAD * known.min():
        grid_ms[stale] *= EXPLORE
        return
    features = np.stack([np.ones_like(tokens), tokens, tokens * lengths[:, None]], -1)
    for count in (3, 2):
        # A table with one column is over tokens alone: there is no length for a quadratic term.
        if fresh.sum() <= count or count > 1 + len(batches):
            continue
        rows = features[fresh][:, :count] / grid_ms[fresh][:, None]
        found, *_ = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)
        if (found >= 0).all():
            estimate = features[..., :count] @ found
            grid_ms[stale] += PULL * (estimate - grid_ms)[stale]
            return


def keep_monotone(grid_ms: Table, trust: Table) -> None:
    """Make the grid non-decreasing along both axes, in place, changing stale nodes before fresh
    ones."""
    fresh = trust >= FRESH
    low = np.where(fresh, grid_ms, 0.0)
    low = np.maximum.accumulate(np.maximum.accumulate(low, axis=0), axis=1)
    high = np.where(fresh, grid_ms, np.inf)[::-1, ::-1]
    high = np.minimum.accumulate(np.minimum.accumulate(high, axis=0), axis=1)[::-1, ::-1]
    kept = np.where(fresh, grid_ms, np.clip(grid_ms, low, np.maximum(low, high)))
    grid_ms[:] = np.maximum.accumulate(np.maximum.accumulate(kept, axis=0), axis=1)
