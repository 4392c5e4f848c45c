"""Response cache: an LRU cache of result vectors, bounded in bytes.

In: a key (model revision, options, token ids) and a vector. Out: the vector, until it is evicted as
the least recently used; the bytes held never exceed the limit::

    cache = ResponseCache(max_nbytes=1 << 20)
    cache.put(key, vector); cache.get(key)      # counts a hit
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from turbotx.serving.tokens import TokenRow

ENTRY_NBYTES = 512  # Python's overhead of one entry: tuple, dict slot, array header


class CacheKey(NamedTuple):
    """Everything that a row's vector depends on; equal keys have equal vectors."""

    revision: str
    options: str
    ids: bytes
    types: bytes

    @classmethod
    def of(cls, revision: str, options: str, row: TokenRow) -> CacheKey:
        """Return the key of a row. revision: the model's; options: what else its vector depends
        on."""
        types = b"" if row.types is None else np.array(row.types, dtype=np.int8).tobytes()
        return cls(revision, options, np.array(row.ids, dtype=np.int32).tobytes(), types)


class ResponseCache:
    """LRU cache bounded in bytes. Not thread-safe: used on the event loop only."""

    def __init__(self, max_nbytes: int) -> None:
        self.max_nbytes = max_nbytes
        self.nbytes = 0
        self.entries: OrderedDict[CacheKey, NDArray[np.float32]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.entries)

    def get(self, key: CacheKey) -> NDArray[np.float32] | None:
        """Return the float32 (width,) vector cached for a key, or None."""
        vector = self.entries.get(key)
        if vector is not None:
            self.entries.move_to_end(key)
        return vector

    def put(self, key: CacheKey, vector: NDArray[np.float32]) -> None:
        """Cache a copy of a float32 (width,) vector; one larger than the whole cache is skipped."""
        nbytes = _entry_nbytes(key, vector)
        if nbytes > self.max_nbytes:
            return
        old = self.entries.pop(key, None)
        if old is not None:
            self.nbytes -= _entry_nbytes(key, old)
        kept = vector.copy()  # a view would keep its whole batch in memory
        kept.flags.writeable = False
        self.entries[key] = kept
        self.nbytes += nbytes
        while self.nbytes > self.max_nbytes:
            oldest, dropped = self.entries.popitem(last=False)
            self.nbytes -= _entry_nbytes(oldest, dropped)


def _entry_nbytes(key: CacheKey, vector: NDArray[np.float32]) -> int:
    return vector.nbytes + len(key.ids) + len(key.types) + ENTRY_NBYTES
