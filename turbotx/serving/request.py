"""Request and batch, the scheduler's input and output.

In: sequences of tokens, each a ``Request``. Out: a ``Batch``, which one call executes, padded to
its longest member or without padding::

    Batch.of([Request("a", 5, 0.0), Request("b", 9, 1.0)], cost_ms=4.4).padded_tokens     # 18
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """One waiting sequence. Times are in ms on the caller's clock."""

    key: Hashable  # chosen by the caller, unique among waiting requests
    length: int  # tokens, >= 1
    arrival_ms: float
    deadline_ms: float = math.inf  # absolute time
    priority: int = 0  # each step multiplies the urgency, see policies.Aged
    model: str = ""  # the model's name on a server of several, see lanes
    weight: float = 1.0  # factor of its urgency; rows of one large request share 1
    patient: bool = False  # part of an admitted large request: no further admission, no age limit


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that run in one call."""

    requests: tuple[Request, ...]
    length: int  # tokens of the longest request; rows are padded to it unless packed
    cost_ms: float  # estimated
    packed: bool = False  # runs without padding

    @classmethod
    def of(cls, requests: Sequence[Request], cost_ms: float, packed: bool = False) -> Batch:
        """Return a batch of requests. cost_ms: its estimated time."""
        return cls(tuple(requests), max(r.length for r in requests), cost_ms, packed)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each request."""
        return [r.length for r in self.requests]

    @property
    def padded_tokens(self) -> int:
        """Tokens that the batch computes, including padding."""
        return self.tokens if self.packed else self.length * len(self.requests)

    @property
    def tokens(self) -> int:
        """Tokens of its requests, without padding."""
        return sum(r.length for r in self.requests)
