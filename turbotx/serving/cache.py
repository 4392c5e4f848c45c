"""Response cache: vectors by input, bounded in bytes, the least recently used dropped first.

In: a key (model revision, options, token ids) and a vector. Out: the vector again, until newer
ones have pushed it out; the bytes held never exceed the bound::

    cache = ResponseCache(max_nbytes=1 << 20)
    cache.put(key, vector); cache.get(key)      # counts a hit
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from turbotx.serving.tokens import TokenRow

ENTRY_NBYTES = 512  # of the interpreter for one entry: tuple, dict slot, array header


class CacheKey(NamedTuple):
    """Equal keys have equal answers."""

    revision: str
    options: str
    ids: bytes
    types: bytes

    @classmethod
    def of(cls, revision: str, options: str, row: TokenRow) -> CacheKey:
        """Return the key of a row. revision: of the model; options: what else decides its
        vector."""
        types = b"" if row.types is None else np.array(row.types, dtype=np.int8).tobytes()
        return cls(revision, options, np.array(row.ids, dtype=np.int32).tobytes(), types)


class ResponseCache:
    """Least recently used out first, bounded by bytes. Not thread-safe: the event loop owns it."""

    def __init__(self, max_nbytes: int) -> None:
        self.max_nbytes = max_nbytes
        self.nbytes = 0
        self.entries: OrderedDict[CacheKey, NDArray[np.float32]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.entries)

    def get(self, key: CacheKey) -> NDArray[np.float32] | None:
        """Return the vector kept for a key, float32 (width); None where there is none."""
        vector = self.entries.get(key)
        if vector is not None:
            self.entries.move_to_end(key)
        return vector

    def put(self, key: CacheKey, vector: NDArray[np.float32]) -> None:
        """Keep a copy of a float32 vector (width); one larger than the whole cache is not kept."""
        nbytes = _entry_nbytes(key, vector)
        if nbytes > self.max_nbytes:
            return
        old = self.entries.pop(key, None)
        if old is not None:
            self.nbytes -= _entry_nbytes(key, old)
        kept = vector.copy()  # a row of a batch would keep the whole batch alive
        kept.flags.writeable = False
        self.entries[key] = kept
        self.nbytes += nbytes
        while self.nbytes > self.max_nbytes:
            oldest, dropped = self.entries.popitem(last=False)
            self.nbytes -= _entry_nbytes(oldest, dropped)


def _entry_nbytes(key: CacheKey, vector: NDArray[np.float32]) -> int:
    return vector.nbytes + len(key.ids) + len(key.types) + ENTRY_NBYTES
