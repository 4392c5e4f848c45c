"""An engine for measuring a server without a model: it sleeps what a cost table says.

In: token rows. Out: a vector a row, made of its token ids, after the time that the batch costs::

    SleepEngine(CostTable.from_function(lambda n, b: 1 + 0.01 * n * b)).run(rows)
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from turbotx.serving.engine import Head, Vectors
from turbotx.serving.token_costs import BatchCosts, TokenCosts
from turbotx.serving.tokens import TokenRow


@dataclass
class SleepEngine:
    """A test engine that sleeps for the time in a cost table and returns vectors derived from the
    token ids."""

    costs: BatchCosts
    width: int = 8
    head: Head = field(default_factory=lambda: Head("embedding"))

    @property
    def packs(self) -> bool:
        """Whether the costs are of batches without padding."""
        return isinstance(self.costs, TokenCosts)

    def run(self, rows: Sequence[TokenRow]) -> Vectors:
        """Sleep for the time in the cost table; return each row's ids, repeated to the width.
        float32, (rows, width)."""
        begin = time.perf_counter()
        due = begin + self.costs.batch_ms([len(row) for row in rows]) / 1e3
        vectors = np.empty((len(rows), self.width), dtype=np.float32)
        for i, row in enumerate(rows):
            vectors[i] = np.resize(np.array(row.ids, dtype=np.float32), self.width)
        time.sleep(max(due - time.perf_counter(), 0.0))
        return vectors

    def figures(self) -> Mapping[str, float]:
        """Return nothing: there is no module to count."""
        return {}
