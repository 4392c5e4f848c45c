"""Cache rows: build a cache from rows of other caches, for batches whose members change.

In: caches that an optimized model has filled, and which rows and how many positions to take. Out: a
cache whose rows all end at the same position. Positions before a shorter row are zeros and must be
masked::

    cache = compose([CacheRow(a, 0, 9), CacheRow(b, 2, 5)], length=9)      # batch 2
    put_row(cache, 1, CacheRow(c, 0, 7))                                   # replaces b's row
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from turbotx.engine.cache_layers import CachedLayer
from turbotx.errors import InputError
from turbotx.runtime.cache_memory import CacheMemory


@dataclass(frozen=True)
class CacheRow:
    """The last `count` positions of one row of a DynamicCache kept by turbotx."""

    cache: Any
    row: int
    count: int


def compose(rows: Sequence[CacheRow], length: int) -> Any:
    """Return a new cache of these rows, each ending at position `length`.

    Raises InputError if a cache has not been filled by an optimized model, or if a row is longer
    than its cache or than `length`; CacheFullError if the model's max_cache_nbytes is exceeded.
    """
    first = memory_of(rows[0].cache)
    made = first.like()
    made.blank(len(rows), length)
    cache = copy.copy(rows[0].cache)
    cache.layers = [
        CachedLayer(made, k, layer.window) for k, layer in enumerate(rows[0].cache.layers)
    ]
    for place, row in enumerate(rows):
        put_row(cache, place, row)
    return cache


def put_row(cache: Any, place: int, row: CacheRow) -> None:
    """Overwrite the last `row.count` positions of row `place` of `cache`.

    The batch of `cache` must not have been reordered. Raises InputError as `compose` does.
    """
    source, target = memory_of(row.cache), memory_of(cache)
    if row.count > min(source.length, target.length):
        raise InputError(
            f"{row.count} positions of a cache of {source.length} do not fit one of {target.length}"
        )
    for layer in range(len(target.shapes)):
        target.put_row(layer, place, *source.read_row(layer, row.row, row.count))


def free_row(cache: Any, place: int) -> None:
    """Free the cache blocks of a finished row; no effect on a cache without blocks.

    Raises InputError as `compose` does.
    """
    memory_of(cache).free_row(place)


def memory_of(cache: Any) -> CacheMemory:
    """Return the memory of a cache; raise InputError if no optimized model has filled it."""
    layers = cache.layers
    if not layers or not all(type(layer) is CachedLayer for layer in layers):
        raise InputError(f"the {type(cache).__name__} has not been filled by an optimized model")
    memory: CacheMemory = layers[0].memory
    return memory
