"""Cache rows: caches of other rows than before, made of rows of several, for batches that change.

In: caches that an optimized model has filled, which rows of them, how many positions of each. Out:
a cache whose rows end at the same position; what is before a shorter row is zeros, to be masked::

    cache = compose([CacheRow(a, 0, 9), CacheRow(b, 2, 5)], length=9)      # batch 2
    put_row(cache, 1, CacheRow(c, 0, 7))                                 # in place of b's row
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
    """The last `count` positions of a row of a DynamicCache that turbotx keeps."""

    cache: Any
    row: int
    count: int


def compose(rows: Sequence[CacheRow], length: int) -> Any:
    """Return a new cache of these rows, each ending at position `length`.

    Raises InputError for a cache that no optimized model has filled yet or a row longer than it is
    or than `length`, CacheFullError where the model's max_cache_nbytes is passed.
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
    """Overwrite the last `row.count` positions of a row of `cache`, whose batch is not reordered.

    Raises InputError as `compose`.
    """
    source, target = memory_of(row.cache), memory_of(cache)
    if row.count > min(source.length, target.length):
        raise InputError(
            f"{row.count} positions of a cache of {source.length} do not fit one of {target.length}"
        )
    for layer in range(len(target.shapes)):
        target.put_row(layer, place, *source.read_row(layer, row.row, row.count))


def let_go_row(cache: Any, place: int) -> None:
    """Let go of what a row of `cache` has that nobody needs any more: its blocks, if it has some.

    Raises InputError as `compose`.
    """
    memory_of(cache).let_go_row(place)


def memory_of(cache: Any) -> CacheMemory:
    """Return the memory of a cache that an optimized model has filled; else raise InputError."""
    layers = cache.layers
    if not layers or not all(type(layer) is CachedLayer for layer in layers):
        raise InputError(f"the {type(cache).__name__} has not been filled by an optimized model")
    memory: CacheMemory = layers[0].memory
    return memory
