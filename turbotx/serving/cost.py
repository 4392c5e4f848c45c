"""Cost table: milliseconds of a batch over (padded length, batch size).

In: a small measured grid, or a function. Out: a dense table, monotone in both directions, which
every observed batch refines and which is kept as JSON, one file per model and device::

    table = CostTable([1, 64, 512], [1, 8, 32], [[4, 5, 8], [5, 9, 30], [9, 40, 160]])
    table.cost_ms(length=100, batch=4)      # interpolated
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbotx.errors import TurbotxError
from turbotx.kernels.build import write_whole
from turbotx.serving import cost_learning

Table = NDArray[np.float64]
PERSISTENT = math.log(1.25)  # of two consecutive errors at a node: the table is wrong
RELAX_EVERY = 4  # batches
REFRESH_EVERY = 16
LEARNING_RATE = 0.1  # of the error of one batch


class CostTableError(TurbotxError, ValueError):
    """A cost table is malformed, or was asked for a batch outside its range."""


class CostTable:
    """Monotone cost in ms of a batch of ``batch`` requests, each padded to ``length`` tokens.

    The grid nodes are measured; between them the cost is interpolated bilinearly. ``observe`` moves
    the four nodes around an executed batch towards its measured time (a normalised
    least-mean-squares step of LEARNING_RATE), so the table follows the machine's load.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batches: Sequence[int],
        cost_ms: Sequence[Sequence[float]] | Table,
    ) -> None:
        self.lengths = _axis("lengths", lengths)
        self.batches = _axis("batches", batches)
        self.grid_ms = np.array(cost_ms, dtype=np.float64)
        if self.grid_ms.shape != (len(self.lengths), len(self.batches)):
            raise CostTableError(
                f"cost grid has shape {self.grid_ms.shape}, but there are {len(self.lengths)} "
                f"lengths and {len(self.batches)} batch sizes: give one row per length"
            )
        if not (np.isfinite(self.grid_ms).all() and (self.grid_ms > 0).all()):
            raise CostTableError("every measured cost must be a finite number of ms above zero")
        self.grid_ms = make_monotone(self.grid_ms)
        self.observations = 0
        self._trust = np.zeros_like(self.grid_ms)  # 1 after a batch at the node, then decays
        self._missed = np.zeros_like(self.grid_ms)  # log(measured / predicted) of the last batch
        self._dense: dict[tuple[int, int | None], Table] = {}

    @classmethod
    def from_function(
        cls, cost_ms: Callable[[int, int], float], max_length: int = 100, max_batch: int = 20
    ) -> CostTable:
        """Return a table with a node at every (length, batch) of the range."""
        lengths, batches = range(1, max_length + 1), range(1, max_batch + 1)
        return cls(lengths, batches, [[cost_ms(n, b) for b in batches] for n in lengths])

    @property
    def max_length(self) -> int:
        """The greatest length in the grid, in tokens."""
        return int(self.lengths[-1])

    @property
    def max_batch(self) -> int:
        """The greatest batch in the grid, in requests."""
        return int(self.batches[-1])

    def cost_ms(self, length: int, batch: int) -> float:
        """Return the estimated milliseconds of a batch padded to `length` tokens; raise
        CostTableError outside of the grid."""
        if not (1 <= length <= self.max_length and 1 <= batch <= self.max_batch):
            raise CostTableError(
                f"no cost for {batch} requests of {length} tokens: the table ends at "
                f"{self.max_batch} requests of {self.max_length} tokens; measure a larger grid"
            )
        return float(self.dense(self.max_batch)[length, batch])

    def batch_ms(self, lengths: Sequence[int]) -> float:
        """Return the estimated ms of a batch of these sequences: see ``cost_ms``."""
        return self.cost_ms(max(lengths), len(lengths))

    def share_ms(self, length: int, max_batch: int | None, max_tokens: int | None) -> float:
        """Return ms of one request in the largest batch of equal requests that the limits allow."""
        row = self.dense(max_batch, max_tokens)[length]
        most = int(np.flatnonzero(np.isfinite(row))[-1])
        return float(row[most]) / most

    def prices(self, max_batch: int | None = None, max_tokens: int | None = None) -> Table:
        """Return the table that policies plan with: ``dense``."""
        return self.dense(max_batch, max_tokens)

    def learn(self, lengths: Sequence[int], took_ms: float, rate: float | None = None) -> None:
        """Refine the table with one executed batch of these sequences: see ``observe``."""
        self.observe(max(lengths), len(lengths), took_ms, rate)

    def dense(self, max_batch: int | None = None, max_tokens: int | None = None) -> Table:
        """(max_length + 1, max_batch + 1) float64, indexed [length, batch]; row and column 0 are 0.

        A batch of two or more that exceeds ``max_tokens`` padded tokens costs infinity; a single
        request is always allowed, whatever its length. The result is cached: do not write to it.
        """
        key = (min(max_batch or self.max_batch, self.max_batch), max_tokens)
        if key not in self._dense:
            self._dense[key] = self._interpolate(*key)
        return self._dense[key]

    def stale(self, longest_ms: float, max_tokens: int | None) -> list[tuple[float, int, int]]:
        """Return (trust, length, batch) of the nodes that no recent batch has visited and whose
        estimated time is at most `longest_ms`."""
        return [
            (float(self._trust[i, j]), int(n), int(b))
            for i, n in enumerate(self.lengths)
            for j, b in enumerate(self.batches)
            if self._trust[i, j] < cost_learning.FRESH and self.grid_ms[i, j] <= longest_ms
            and (b == 1 or max_tokens is None or n * b <= max_tokens)
        ]  # fmt: skip

    def observe(self, length: int, batch: int, took_ms: float, rate: float | None = None) -> None:
        """Refine the table with one executed batch.

        rate: step size towards the measured time, 0 to 1; None: LEARNING_RATE. Outliers are
        clipped to a factor of 4 from the prediction. If the previous batch at this node was off in
        the same direction too, the table is wrong: the step is then 0.5, and nodes that no recent
        batch has visited move along (``cost_learning``).
        """
        i, wi = _position(self.lengths, length)
        j, wj = _position(self.batches, batch)
        rows, cols = (i, min(i + 1, len(self.lengths) - 1)), (j, min(j + 1, len(self.batches) - 1))
        weights = np.outer((1 - wi, wi), (1 - wj, wj))
        block = np.ix_(rows, cols)
        predicted = float((weights * self.grid_ms[block]).sum())
        took_ms = float(np.clip(took_ms, predicted / 4, predicted * 4))
        nearest = (rows[round(wi)], cols[round(wj)])
        miss, before = math.log(took_ms / predicted), float(self._missed[nearest])
        self._missed[nearest] = miss
        wrong = miss * before > 0 and min(abs(miss), abs(before)) > PERSISTENT
        rate = rate or LEARNING_RATE
        rate = max(rate, 0.5) if wrong else rate
        step = rate * (took_ms - predicted) / float((weights**2).sum())
        for r, row in enumerate(rows):
            for c, col in enumerate(cols):
                moved = self.grid_ms[row, col] + step * weights[r, c]
                self._set_node(row, col, max(moved, self.grid_ms[row, col] / 4))
        self.observations += 1
        self._spread(nearest, rate * miss if wrong else 0.0)
        if self.observations % REFRESH_EVERY == 0 or wrong:
            self._dense.clear()

    def _spread(self, nearest: tuple[int, int], log_step: float) -> None:
        """Move nodes without recent batches by the same relative step as those with some."""
        self._trust *= cost_learning.FORGET
        self._trust[nearest] = 1.0
        relaxing = self.observations % RELAX_EVERY == 0
        if log_step:
            cost_learning.follow(self.grid_ms, self._trust, log_step)
        if relaxing:
            cost_learning.relax(self.grid_ms, self._trust, self.lengths, self.batches)
        if log_step or relaxing:
            cost_learning.keep_monotone(self.grid_ms, self._trust)

    def _set_node(self, row: int, col: int, value_ms: float) -> None:
        """Set a node's cost; less recently visited nodes are changed to keep the table monotone."""
        above, below = self.grid_ms[row:, col:], self.grid_ms[: row + 1, : col + 1]
        np.maximum(above, value_ms, out=above)
        np.minimum(below, value_ms, out=below)

    def _interpolate(self, max_batch: int, max_tokens: int | None) -> Table:
        lengths = np.arange(1, self.max_length + 1)
        batches = np.arange(1, max_batch + 1)
        by_batch = np.stack([np.interp(batches, self.batches, row) for row in self.grid_ms])
        dense = np.zeros((self.max_length + 1, max_batch + 1))
        for b in batches:
            dense[1:, b] = np.interp(lengths, self.lengths, by_batch[:, b - 1])
        if max_tokens is not None:
            over = np.multiply.outer(np.arange(self.max_length + 1), np.arange(max_batch + 1))
            over[:, :2] = 0
            dense[over > max_tokens] = np.inf
        return np.ascontiguousarray(dense)

    def to_dict(self) -> dict[str, Any]:
        """Return grid, times in ms and counts of observations, ready for JSON."""
        return {
            "lengths": self.lengths.tolist(),
            "batches": self.batches.tolist(),
            "cost_ms": self.grid_ms.tolist(),
            "observations": self.observations,
        }

    def save(self, path: Path, *, model: str = "") -> None:
        """Write JSON atomically (a temporary file, then a rename)."""
        write_whole(path, json.dumps({"model": model, **self.to_dict()}))

    @classmethod
    def load(cls, path: Path) -> CostTable:
        """Read a file written by ``save``. Raises CostTableError if it is not a cost table."""
        try:
            data = json.loads(path.read_text())
            table = cls(data["lengths"], data["batches"], data["cost_ms"])
            table.observations = int(data["observations"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CostTableError(
                f"{path} is not a cost table ({error}): delete it and measure again"
            ) from error
        return table


def make_monotone(grid: Table) -> Table:
    """Return a table near `grid` that never decreases along either axis.

    The running maximum from below and the running minimum from above are both monotone; their mean
    is returned, which leaves a monotone table unchanged.
    """
    rising = np.maximum.accumulate(np.maximum.accumulate(grid, axis=0), axis=1)
    falling = np.minimum.accumulate(np.minimum.accumulate(grid[::-1, ::-1], axis=0), axis=1)
    return (rising + falling[::-1, ::-1]) / 2


def _axis(name: str, values: Sequence[int]) -> NDArray[np.int64]:
    axis = np.array(values, dtype=np.int64)
    if axis.ndim != 1 or axis.size == 0 or axis[0] < 1 or (np.diff(axis) <= 0).any():
        raise CostTableError(f"{name} must rise strictly from 1 or above, got {list(values)}")
    if name == "batches" and axis[0] != 1:
        raise CostTableError(f"batches must begin at 1, got {list(values)}")
    return axis


def _position(axis: NDArray[np.int64], value: int) -> tuple[int, float]:
    """Return the index of the node at or below ``value`` and the fraction of the way to the next
    node, clamped to the ends of the axis."""
    i = int(np.searchsorted(axis, value, side="right")) - 1
    if i < 0:
        return 0, 0.0
    if i >= len(axis) - 1:
        return len(axis) - 1, 0.0
    return i, float((value - axis[i]) / (axis[i + 1] - axis[i]))
