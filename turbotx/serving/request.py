"""What is scheduled: requests in, batches out.

A ``Request`` is one sequence; a ``Batch`` is what the runtime executes at once, padded to its
longest member, or without padding::

    Batch.of([Request("a", 5, 0.0), Request("b", 9, 1.0)], cost_ms=4.4).padded_tokens     # 18
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence that waits to be computed. All times are on the caller's clock."""

    key: Hashable  # the caller's name for it, unique among the waiting
    length: int  # tokens, >= 1
    arrival_ms: float
    deadline_ms: float = math.inf  # when its answer is due
    priority: int = 0  # each step up is worth a factor of urgency, see policies.Aged
    model: str = ""  # whose batches it may be in, where there are several: see lanes
    weight: float = 1.0  # of its urgency: of a client's many, admitted together, each has its part
    patient: bool = False  # of a client's many, admitted together: it may wait for any time


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests to run together."""

    requests: tuple[Request, ...]
    length: int  # of the longest request: every row is padded to it, unless it is packed
    cost_ms: float  # what the costs predict
    packed: bool = False  # without padding

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
        """Tokens that the batch computes, padding included."""
        return self.tokens if self.packed else self.length * len(self.requests)

    @property
    def tokens(self) -> int:
        """Tokens of its requests, without padding."""
        return sum(r.length for r in self.requests)
