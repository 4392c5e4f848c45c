"""Measures batch costs again while the server is idle, one shape at a time.

In: the models' engines and cost tables. Out: the next shape to time. A request that arrives
meanwhile waits for at most one short batch::

    shape = idle.next_shape()                       # ("", 128, 4), None: all are measured
    idle.learn(shape, idle.time_ms(shape))
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from turbotx.serving.engine import BatchEngine
from turbotx.serving.measure import time_ms
from turbotx.serving.token_costs import BatchCosts
from turbotx.serving.tokens import TokenRow

Shape = tuple[str, int, int]  # a model, a length, a batch size
ROUNDS = 3  # measurements per shape and idle period
FIRST_S, NEXT_S = 5.0, 0.25  # idle time before the first measurement, and between two


@dataclass
class IdleMeasuring:
    """Used on the event loop, except ``time_ms``, which runs in the engine's thread."""

    engines: Mapping[str, BatchEngine]
    tables: Mapping[str, BatchCosts]
    tokens: Mapping[str, int]  # a valid token id of each model
    longest_ms: float  # shapes expected to take longer are not measured
    max_tokens: int | None = None  # padded tokens; larger batches never run
    first_s: float = FIRST_S
    finished: Callable[[], None] = lambda: None  # called after the last: saves the tables
    _timed: Counter[Shape] = field(default_factory=Counter, init=False)
    _over: bool = field(default=False, init=False)

    @property
    def wait_s(self) -> float | None:
        """Seconds without requests before the next shape is measured; None if all are measured."""
        if self._over:
            return None
        return NEXT_S if self._timed else self.first_s

    def begin(self) -> None:
        """Restart the idle timer after a request."""
        self._timed.clear()
        self._over = False

    def next_shape(self) -> Shape | None:
        """Return the shape least recently measured; after the last, call ``finished``, return
        None."""
        known = [
            (self._timed[model, length, batch], trust, (model, length, batch))
            for model, table in self.tables.items()
            for trust, length, batch in table.stale(self.longest_ms, self.max_tokens)
        ]
        open_ = [(rounds, trust, shape) for rounds, trust, shape in known if rounds < ROUNDS]
        open_ += [
            (rounds, math.inf, shape) for shape, rounds in self._timed.items() if rounds < ROUNDS
        ]
        if open_:
            return min(open_)[2]
        self._over = True
        self.finished()
        return None

    def time_ms(self, shape: Shape) -> float:
        """Run a batch of the shape once; return its ms."""
        model, length, batch = shape
        return time_ms(self.engines[model], [TokenRow((self.tokens[model],) * length)] * batch)

    def learn(self, shape: Shape, took_ms: float) -> None:
        """Move the cost table by half the difference (nothing else ran in this process)."""
        model, length, batch = shape
        self._timed[shape] += 1
        self.tables[model].learn([length] * batch, took_ms, rate=0.5)
