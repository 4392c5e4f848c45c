"""Token costs: milliseconds of a batch without padding, over its tokens and their squares.

In: measured ms at some numbers of tokens, and attention's cost per squared length. Out: the cost of
any batch, refined by every executed one; and the knee, the number of tokens from which larger
batches do not lower the cost per token::

    costs = TokenCosts([1, 64, 1024], [2.0, 4.0, 40.0], square_ms=4e-6, max_length=512)
    costs.batch_ms([5, 500, 17])        # by_tokens(522) + square_ms * (25 + 250000 + 289)
    costs.prices().knee                 # 1024
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbotx.kernels.build import write_whole
from turbotx.serving import cost_learning
from turbotx.serving.cost import CostTable, CostTableError, Table

Floats = NDArray[np.float64]
WORTH = 0.02  # relative excess over the least cost per token that ends a batch
DOUBT = 0.05  # regularization of the fit towards present values
LEAST_SQUARE = 1e-6  # of a token's cost: keeps multiplicative updates possible
SHORT = 32  # sequences of this length have negligible attention cost


@dataclass(frozen=True)
class TokenCurve:
    """Costs by tokens alone: ms, (tokens + 1,), 0 at 0, with a non-increasing cost per token; and
    the table of which they were made."""

    by_tokens: Floats
    source: Table

    @classmethod
    def of(cls, table: Table) -> TokenCurve:
        """Return the curve of a dense table with one column, raised so that the cost per token
        never increases with the batch: unvisited nodes get cheaper over time, which should favour
        large batches."""
        tokens = np.arange(len(table), dtype=np.float64)
        rates = table[1:, 1] / tokens[1:]
        least = np.maximum.accumulate(rates[::-1])[::-1]
        return cls(tokens * np.concatenate(([0.0], least)), table)

    @cached_property
    def knee(self) -> int:
        """The fewest tokens whose cost per token is within ``WORTH`` of the least."""
        rates = self.by_tokens[1:] / np.arange(1, len(self.by_tokens))
        return int(np.argmax(rates <= (1 + WORTH) * rates[-1])) + 1


@dataclass(frozen=True)
class TokenPrices:
    """Costs of batches within limits, infinity beyond; used by policies.

    square_ms: ms per squared length of a sequence. A single sequence is always allowed; batches of
    several have at most ``max_batch`` members and ``budget`` tokens, the smaller of knee and
    ``max_tokens``.
    """

    curve: TokenCurve
    square_ms: float
    max_batch: int
    max_tokens: int

    @property
    def by_tokens(self) -> Floats:
        """Ms of a batch by its tokens, without ``square_ms``: (tokens + 1,)."""
        return self.curve.by_tokens

    @property
    def knee(self) -> int:
        """The fewest tokens whose cost per token is within ``WORTH`` of the least."""
        return self.curve.knee

    @cached_property
    def budget(self) -> int:
        """Most tokens of a batch of several: beyond the knee, a larger batch only adds waiting
        time."""
        return min(self.knee, self.max_tokens)

    @cached_property
    def rate(self) -> float:
        """Ms of a token in a batch filled up to the budget."""
        return float(self.by_tokens[self.budget]) / self.budget

    def alone_ms(self, lengths: NDArray[np.int64]) -> Floats:
        """Return each sequence's ms in a batch filled up to the budget, float64 (sequences,)."""
        found: Floats = lengths * self.rate + self.square_ms * lengths.astype(np.float64) ** 2
        return found

    def share_ms(self, length: int) -> float:
        """Return the ms of one sequence in a batch filled up to the budget."""
        return length * self.rate + self.square_ms * length**2

    def batch_ms(self, lengths: Sequence[int]) -> float:
        """Return a batch's ms; infinity for several sequences beyond the limits."""
        tokens = sum(lengths)
        if len(lengths) > 1 and (len(lengths) > self.max_batch or tokens > self.max_tokens):
            return math.inf
        return float(self.by_tokens[tokens]) + self.square_ms * sum(n * n for n in lengths)


class TokenCosts:
    """Cost in ms of a batch without padding: a function of its tokens, plus ``square_ms`` per pair
    of tokens of a sequence.

    The function is a ``CostTable`` with one column, refined in the same way.
    """

    def __init__(
        self, tokens: Sequence[int], cost_ms: Sequence[float], square_ms: float, max_length: int,
        *, line: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        """cost_ms: at the numbers of ``tokens``, without square_ms; linear in between. line: (ms
        per launch, ms per token), an approximation of it. Raises CostTableError for invalid
        tables."""
        self.by_tokens = CostTable(tokens, [1], [[ms] for ms in cost_ms])
        if not (math.isfinite(square_ms) and square_ms >= 0 and 1 <= max_length <= tokens[-1]):
            raise CostTableError(
                f"square_ms {square_ms} must be a finite number of ms, and max_length {max_length} "
                f"within the {tokens[-1]} tokens of the table"
            )
        self.square_ms, self.max_length = square_ms, max_length
        slope = (cost_ms[-1] - cost_ms[0]) / max(tokens[-1] - tokens[0], 1)
        self._line = np.array(line or [cost_ms[0], slope], dtype=np.float64)
        self._seen, self._aim = np.zeros((3, 3)), np.zeros(3)  # normal equations of `_tell_apart`
        self._made: dict[tuple[int | None, int | None], TokenPrices] = {}
        self._curve: TokenCurve | None = None  # of the latest prices

    @classmethod
    def from_rates(
        cls, launch_ms: float, token_ms: float, square_ms: float, max_length: int, max_tokens: int
    ) -> TokenCosts:
        """Return the costs of a machine with a fixed cost per launch, token and pair of tokens."""
        ends = [1, max_tokens]
        return cls(ends, [launch_ms + token_ms * n for n in ends], square_ms, max_length)

    @property
    def max_tokens(self) -> int:
        """The greatest number of tokens in the table."""
        return self.by_tokens.max_length

    @property
    def observations(self) -> int:
        """Number of batches observed."""
        return self.by_tokens.observations

    def prices(self, max_batch: int | None = None, max_tokens: int | None = None) -> TokenPrices:
        """Return the policies' costs within limits; None: the table's limits."""
        found = self._made.get((max_batch, max_tokens))
        if found is None:
            most = min(max_tokens or self.max_tokens, self.max_tokens)
            table = self.by_tokens.dense()
            if self._curve is None or self._curve.source is not table:
                self._curve = TokenCurve.of(table)
            found = TokenPrices(self._curve, self.square_ms, max_batch or most, most)
            self._made[max_batch, max_tokens] = found
        return found

    def batch_ms(self, lengths: Sequence[int]) -> float:
        """Return a batch's estimated ms; raise CostTableError beyond the table."""
        if min(lengths) < 1 or max(lengths) > self.max_length:
            raise CostTableError(f"no cost for sequences of {lengths}: at most {self.max_length}")
        if sum(lengths) > self.max_tokens:
            raise CostTableError(f"no cost for {sum(lengths)} tokens: at most {self.max_tokens}")
        return self.prices().batch_ms(lengths)

    def share_ms(self, length: int, max_batch: int | None, max_tokens: int | None) -> float:
        """Return ms of one request in the largest batch of equal requests that the limits allow."""
        return self.prices(max_batch, max_tokens).share_ms(length)

    def learn(self, lengths: Sequence[int], took_ms: float, rate: float | None = None) -> None:
        """Refine the costs with one executed batch; rate: as in ``CostTable.observe``."""
        tokens, squares = sum(lengths), sum(n * n for n in lengths)
        flat_ms = float(self.by_tokens.dense()[tokens, 1])
        predicted = flat_ms + self.square_ms * squares
        took_ms = min(max(took_ms, predicted / 4), predicted * 4)
        self._tell_apart(np.array([1.0, tokens, squares]) / took_ms)
        rest_ms = max(took_ms - self.square_ms * squares, flat_ms / 4)
        self.by_tokens.observe(tokens, 1, rest_ms, rate)
        self._made.clear()

    def _tell_apart(self, features: Floats) -> None:
        """Move ``square_ms`` towards a fit of recent batches, a + b * tokens + c * squares.

        Least squares of relative errors, regularized towards present values for batches that do not
        separate the terms, such as sequences of one length: all three then scale alike.
        """
        self._seen *= cost_learning.FORGET
        self._seen += np.outer(features, features)
        self._aim = cost_learning.FORGET * self._aim + features
        launch_ms, token_ms = self._line
        floors = np.array([token_ms, 1e-9, LEAST_SQUARE * token_ms])
        now = np.maximum([launch_ms, token_ms, self.square_ms], floors)
        scaled = self._seen * np.outer(now, now)
        error = self._aim * now - scaled.sum(1)
        change = np.linalg.solve(scaled + DOUBT * np.eye(3), error)
        now *= np.clip(1 + change, 0.5, 2.0) ** cost_learning.PULL
        self._line, self.square_ms = now[:2], float(now[2])

    def stale(self, longest_ms: float, max_tokens: int | None) -> list[tuple[float, int, int]]:
        """Return (trust, length, batch) of shapes without recent batches: see
        ``CostTable.stale``."""
        found = self.by_tokens.stale(longest_ms, max_tokens)
        shapes = [(trust, min(n, SHORT, self.max_length), n) for trust, n, _ in found]
        return [(trust, length, max(n // length, 1)) for trust, length, n in shapes]

    def to_dict(self) -> dict[str, Any]:
        """Return the tokens of the nodes, times in ms and counts, ready for JSON."""
        inner = self.by_tokens
        return {
            "tokens": inner.lengths.tolist(), "cost_ms": inner.grid_ms[:, 0].tolist(),
            "square_ms": self.square_ms, "line": self._line.tolist(), "max_length": self.max_length,
            "observations": inner.observations,
        }  # fmt: skip

    def save(self, path: Path, *, model: str = "") -> None:
        """Write JSON atomically."""
        write_whole(path, json.dumps({"model": model, **self.to_dict()}))

    @classmethod
    def load(cls, path: Path) -> TokenCosts:
        """Read a file written by ``save``. Raises CostTableError if it is not such a table."""
        try:
            data = json.loads(path.read_text())
            fields = ("tokens", "cost_ms", "square_ms", "max_length")
            found = cls(*(data[name] for name in fields), line=data["line"])
            found.by_tokens.observations = int(data["observations"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CostTableError(
                f"{path} is not a table of token costs ({error}): delete it and measure again"
            ) from error
        return found


BatchCosts = CostTable | TokenCosts
Prices = Table | TokenPrices
