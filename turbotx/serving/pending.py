"""Pending rows: what the dispatcher knows of each row in flight.

In: a row and its model. Out: a record whose ``done`` is the row's vector, for all who await it::

    row = PendingRow(0, tokens, cache_key, arrival_ms, loop.create_future(), Lane(engine))
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from turbotx.serving.cache import CacheKey
from turbotx.serving.engine import BatchEngine
from turbotx.serving.tokens import TokenRow


@dataclass(frozen=True)
class Lane:
    """One model: its engine, and the parts of the cache key that identify it."""

    engine: BatchEngine
    revision: str = ""


@dataclass
class PendingRow:
    """One row in flight and the requests that await it."""

    key: int
    row: TokenRow
    cache_key: CacheKey
    arrival_ms: float
    done: asyncio.Future[NDArray[np.float32]] = field(repr=False)
    lane: Lane
    awaited_by: int = 1
    queued_ms: float = math.nan  # time until its batch started
    took_ms: float = math.nan  # duration of its batch
