"""Cache rows: caches of other rows than before, made of rows of several, for batches that change.

In: caches that an optimized model has filled, which rows of them, how many positions of each. Out:
a cache whose rows end at the same position; what is before a shorter row is to be masked. Where
caches lie in blocks, its rows are rows of their tables, and no keys or values move::

    cache = compose([CacheRow(a, 0, 9), CacheRow(b, 2, 5)], length=73)      # batch 2
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from turbotx.engine.cache_layers import CachedLayer
from turbotx.errors import InputError
from turbotx.runtime.cache_memory import CacheMemory, MemoryRow


@dataclass(frozen=True)
class CacheRow:
    """The last `count` positions of a row of a DynamicCache that turbotx keeps."""

    cache: Any
    row: int
    count: int


def compose(rows: Sequence[CacheRow], length: int) -> Any:
    """Return a new cache of these rows, each ending at position `length`.

    Raises InputError for a cache that no optimized model has filled yet, a row longer than it is or
    than `length`, or one in blocks that ends at another place of a block than `length` does;
    CacheFullError where a contiguous copy passes the model's max_cache_nbytes.
    """
    found = [MemoryRow(memory_of(row.cache), row.row, row.count) for row in rows]
    for row in found:
        if row.count > min(row.memory.length, length):
            raise InputError(
                f"{row.count} positions of a cache of {row.memory.length} do not fit one of "
                f"{length}"
            )
    made = found[0].memory.like()
    made.gather(found, length)
    return _with_memory(rows[0].cache, made)


def blank_like(cache: Any, batch: int, length: int) -> Any:
    """Return a new cache of the same kind, whose rows have `length` positions to be masked.

    Raises InputError as `compose`.
    """
    made = memory_of(cache).like()
    made.blank(batch, length)
    return _with_memory(cache, made)


def let_go(cache: Any) -> None:
    """Let go of all that a cache holds; raise InputError as `compose`."""
    memory = memory_of(cache)
    for layer in range(len(memory.shapes)):
        memory.clear(layer)


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


def _with_memory(cache: Any, memory: CacheMemory) -> Any:
    made = copy.copy(cache)
    made.layers = [CachedLayer(memory, k, layer.window) for k, layer in enumerate(cache.layers)]
    return made
