"""An idle server measures costs again, a shape at a time.

In: the models' engines and cost tables. Out: the shape to time next, while nobody asks; who comes
meanwhile waits for one short batch at most::

    shape = idle.next_shape()                       # ("", 128, 4), None: all are known
    idle.learn(shape, idle.time_ms(shape))
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from turbotx.serving.engine import BatchEngine
from turbotx.serving.token_costs import BatchCosts
from turbotx.serving.tokens import TokenRow

Shape = tuple[str, int, int]  # a model, a length, a batch size
ROUNDS = 3  # of a shape while nobody comes
FIRST_S, NEXT_S = 5.0, 0.25  # without a request before the first one, and before each further one


@dataclass
class IdleMeasuring:
    """Owned by the event loop; ``time_ms`` alone runs in the engine's thread."""

    engines: Mapping[str, BatchEngine]
    tables: Mapping[str, BatchCosts]
    tokens: Mapping[str, int]  # one that each model knows
    longest_ms: float  # no shape that is thought to take longer: somebody might come
    max_tokens: int | None = None  # padded: others never run
    first_s: float = FIRST_S
    finished: Callable[[], None] = lambda: None  # all is known: the time to keep it
    _timed: Counter[Shape] = field(default_factory=Counter, init=False)
    _over: bool = field(default=False, init=False)

    @property
    def wait_s(self) -> float | None:
        """How long nobody must have come before the next shape; None: there is none."""
        if self._over:
            return None
        return NEXT_S if self._timed else self.first_s

    def begin(self) -> None:
        """Somebody came: the next idle time begins anew."""
        self._timed.clear()
        self._over = False

    def next_shape(self) -> Shape | None:
        """Return the one unvisited for longest; None, and ``finished`` called, after the last."""
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
        """Run it once."""
        model, length, batch = shape
        rows = [TokenRow((self.tokens[model],) * length)] * batch
        begin = time.perf_counter()
        self.engines[model].run(rows)
        return max((time.perf_counter() - begin) * 1e3, 1e-3)

    def learn(self, shape: Shape, took_ms: float) -> None:
        """Half the way each time: nothing else ran in this process, and it is seen again."""
        model, length, batch = shape
        self._timed[shape] += 1
        self.tables[model].learn([length] * batch, took_ms, rate=0.5)
