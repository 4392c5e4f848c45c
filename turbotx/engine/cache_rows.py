"""Cache rows: build a cache from rows of other caches, for batches whose members change.

In: caches that an optimized model has filled, and which rows and how many positions to take. Out: a
cache whose rows all end at the same position. Positions before a shorter row must be masked. Rows
of caches in blocks are rows of block tables; no keys or values move::

    cache = compose([CacheRow(a, 0, 9), CacheRow(b, 2, 5)], length=73)      # batch 2
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from turbotx.engine.cache_layers import CachedLayer
from turbotx.errors import InputError
from turbotx.memory.cache_blocks import Ids
from turbotx.runtime.block_memory import BlockMemory
from turbotx.runtime.cache_memory import CacheMemory, MemoryRow


@dataclass(frozen=True)
class CacheRow:
    """The last `count` positions of one row of a DynamicCache kept by turbotx."""

    cache: Any
    row: int
    count: int


def compose(rows: Sequence[CacheRow], length: int) -> Any:
    """Return a new cache of these rows, each ending at position `length`.

    Raises InputError if a cache has not been filled by an optimized model, if a row is longer than
    its cache or than `length`, or if a cache in blocks ends at another position of a block than
    `length` does; CacheFullError if a contiguous copy exceeds the model's max_cache_nbytes.
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


def blank_like(cache: Any, batch: int, length: int, known: Ids | None = None) -> Any:
    """Return a new cache of the same kind, whose rows have `length` positions to be masked.

    known: blocks of a cache in blocks that the first positions have, (layers, batch, columns), -1
    for none. The batch of `cache` must not have been reordered. Raises InputError as `compose`
    does.
    """
    made = memory_of(cache).like()
    if isinstance(made, BlockMemory):
        made.blank(batch, length, known)
    else:
        made.blank(batch, length)
    return _with_memory(cache, made)


def free_cache(cache: Any) -> None:
    """Free all that a cache holds; raise InputError as `compose` does."""
    memory = memory_of(cache)
    for layer in range(len(memory.shapes)):
        memory.clear(layer)


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


def _with_memory(cache: Any, memory: CacheMemory) -> Any:
    made = copy.copy(cache)
    made.layers = [CachedLayer(memory, k, layer.window) for k, layer in enumerate(cache.layers)]
    return made
