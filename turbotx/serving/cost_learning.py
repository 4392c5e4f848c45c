"""Cost learning: updates the cost table from executed batches, also for shapes that did not run.

In: a cost grid, how fresh the knowledge of each node is, a step that fresh ones have made. Out:
the same grid, its stale nodes moved; a shape that looks dear is never run, so nothing else would::

    follow(grid_ms, trust, log_step=-0.4)       # stale nodes fall as the fresh ones did
    relax(grid_ms, trust, tokens, lengths)      # and draw near to what the fresh ones suggest
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]

FORGET = 0.98  # of a node's trust, with every batch elsewhere
FRESH = 0.5  # trust from which a node counts as known
PULL = 0.25  # of the way to the estimate, each time
EXPLORE = 0.93  # where nothing can be estimated, each time
SPREAD = 4.0  # fresh nodes must span this factor of tokens to tell a slope


def follow(grid_ms: Table, trust: Table, log_step: float) -> None:
    """Move stale nodes, in place, by the mean relative step of the fresh ones.

    A machine that was busy while it was measured made all costs too high alike.
    """
    grid_ms *= np.exp(log_step * (1 - trust) / max(trust.sum(), 1.0))


def relax(grid_ms: Table, trust: Table, lengths: NDArray[np.int64], batches: NDArray[np.int64]) -> None:  # fmt: skip  # noqa: E501
    """Draw stale nodes, in place, to a + b * tokens (+ c * length * tokens) through the fresh ones.

    Least squares of relative errors. Where the fresh nodes are too few or too alike to tell, stale
    ones become a little cheaper, until their shape is tried. An estimate that is too low heals
    itself: its shape is chosen, and measured.
    """
    tokens = np.multiply.outer(lengths, batches).astype(np.float64)
    fresh, stale = trust >= FRESH, trust < FRESH
    known = tokens[fresh]
    if fresh.sum() < 3 or known.max() < SPREAD * known.min():
        grid_ms[stale] *= EXPLORE
        return
    features = np.stack([np.ones_like(tokens), tokens, tokens * lengths[:, None]], -1)
    for count in (3, 2):
        # Of one column, by tokens alone, a square is no attention: it would be an extrapolation.
        if fresh.sum() <= count or count > 1 + len(batches):
            continue
        rows = features[fresh][:, :count] / grid_ms[fresh][:, None]
        found, *_ = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)
        if (found >= 0).all():
            estimate = features[..., :count] @ found
            grid_ms[stale] += PULL * (estimate - grid_ms)[stale]
            return


def keep_monotone(grid_ms: Table, trust: Table) -> None:
    """Make the grid rise along both axes, in place: stale nodes give way to fresh ones."""
    fresh = trust >= FRESH
    low = np.where(fresh, grid_ms, 0.0)
    low = np.maximum.accumulate(np.maximum.accumulate(low, axis=0), axis=1)
    high = np.where(fresh, grid_ms, np.inf)[::-1, ::-1]
    high = np.minimum.accumulate(np.minimum.accumulate(high, axis=0), axis=1)[::-1, ::-1]
    kept = np.where(fresh, grid_ms, np.clip(grid_ms, low, np.maximum(low, high)))
    grid_ms[:] = np.maximum.accumulate(np.maximum.accumulate(kept, axis=0), axis=1)
