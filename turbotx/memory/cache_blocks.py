"""Cache blocks: reference-counted memory blocks of one size for key/value caches.

In: how many blocks to allocate, share or release. Out: block ids. Block n begins n * block_nbytes
after an address that never moves, and is free when its reference count drops to 0. A budget counts
the bytes of all caches of a model::

    blocks = CacheBlocks(393216, budget.add)
    ids = blocks.take(3); blocks.share(ids[:1]); blocks.release(ids)     ->  one stays in use
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from turbotx.errors import CacheFullError
from turbotx.memory.arena import view_addresses
from turbotx.memory.cpu_range import CpuRange, load_libc
from turbotx.memory.planner.plan import CHUNK_NBYTES, align

Ids = NDArray[np.int64]


def count_addresses() -> int:
    """Return how many bytes of addresses to reserve: twice the machine's memory."""
    return 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def can_have_blocks(device: torch.device) -> bool:
    """Return whether address ranges can grow in place: on a CPU with mmap."""
    return device.type == "cpu" and load_libc() is not None


class CacheBlocks:
    """All blocks of one size used by the caches of one model; thread-safe.

    references: (blocks,) int32 reference counts, 0 for a free block.
    count: called with the number of bytes about to be used, negative when they are freed; it raises
    if the limit is exceeded.
    """

    def __init__(self, block_nbytes: int, count: Callable[[int], None]) -> None:
        self.block_nbytes = block_nbytes
        self.references = np.zeros(0, dtype=np.int32)
        self._range, self._count = CpuRange(count_addresses()), count
        self._released: deque[Ids] = deque()
        self._lock = threading.Lock()
        self.memory = view_addresses(self._range, self._range.capacity_nbytes)
        """All reserved addresses; those beyond the mapped blocks must not be accessed."""

    @property
    def used(self) -> int:
        """Number of blocks with references."""
        return int(np.count_nonzero(self.references))

    @property
    def mapped_nbytes(self) -> int:
        """Bytes of mapped memory, free blocks included."""
        return self._range.mapped_nbytes

    def take(self, count: int) -> Ids:
        """Allocate `count` blocks with one reference each; return their ids, (count,). Contents are
        undefined.

        Raises what the `count` callback raises, or MemoryExhausted; nothing is allocated then.
        """
        if count == 0:
            return np.zeros(0, dtype=np.int64)
        with self._lock:
            self._drain()
            self._count(count * self.block_nbytes)
            try:
                free = self._find_free(count)
            except BaseException:
                self._count(-count * self.block_nbytes)
                raise
            self.references[free] = 1
        self._settle()
        return free

    def share(self, ids: Ids) -> None:
        """Add one reference per occurrence of a block in `ids`."""
        with self._lock:
            np.add.at(self.references, ids, 1)
        self._settle()

    def release(self, ids: Ids) -> None:
        """Drop one reference per occurrence of a block in `ids`.

        Safe to call from finalizers, at any point of any thread: if the lock is held, its holder
        completes the release.
        """
        self._released.append(ids)
        self._settle()

    def _settle(self) -> None:
        while self._released and self._lock.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._lock.release()

    def _drain(self) -> None:
        while self._released:
            ids = self._released.popleft()
            np.subtract.at(self.references, ids, 1)
            named = np.unique(ids)
            self._count(-int(np.count_nonzero(self.references[named] == 0)) * self.block_nbytes)
            self._trim()

    def _find_free(self, count: int) -> Ids:
        free = np.flatnonzero(self.references == 0)
        if len(free) < count:
            known = len(self.references)
            end = known + count - len(free)
            self._range.map_to(align(end * self.block_nbytes, CHUNK_NBYTES))
            self.references = np.concatenate([self.references, np.zeros(end - known, np.int32)])
            free = np.concatenate([free, np.arange(known, end)])
        return free[:count]

    def _trim(self) -> None:
        """Unmap memory after the last used block if it is more than half of the total."""
        used = np.flatnonzero(self.references)
        end = int(used[-1]) + 1 if len(used) else 0
        if 2 * end < len(self.references):
            self.references = self.references[:end].copy()
            self._range.unmap_to(align(end * self.block_nbytes, CHUNK_NBYTES))


class CacheBudget:
    """Counts the bytes of all caches of one model, and their peak.

    most: the limit; None for no limit.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most, self.nbytes, self.peak_nbytes = most, 0, 0
        self._lock = threading.RLock()  # reentrant: finalizers may run in this thread at any point
        self._blocks: dict[int, CacheBlocks] = {}

    def __deepcopy__(self, memo: Any) -> CacheBudget:
        return self  # a copied cache belongs to the same model

    def __reduce__(self) -> Any:
        return CacheBudget, (self.most,)

    def blocks_of(self, nbytes: int) -> CacheBlocks:
        """Return the blocks of a size, shared by all caches."""
        with self._lock:
            if nbytes not in self._blocks:
                self._blocks[nbytes] = CacheBlocks(nbytes, self.add)
            return self._blocks[nbytes]

    def stats(self) -> dict[str, int]:
        """Return the current and peak bytes of all caches, and their blocks, shared ones once."""
        used = sum(blocks.used for blocks in list(self._blocks.values()))
        most = self.peak_nbytes
        return {"cache_nbytes": self.nbytes, "cache_peak_nbytes": most, "cache_blocks": used}

    def has_room(self, nbytes: int) -> bool:
        """Return whether that many more bytes are within the limit."""
        return self.most is None or self.nbytes + nbytes <= self.most

    def add(self, nbytes: int) -> None:
        """Count bytes about to be allocated, or freed if negative.

        Raises CacheFullError if the limit would be exceeded.
        """
        with self._lock:
            if nbytes > 0 and not self.has_room(nbytes):
                raise CacheFullError(
                    f"key/value caches hold {self.nbytes} bytes, and {nbytes} more would pass "
                    f"max_cache_nbytes={self.most}: let go of a cache, call with fewer or shorter "
                    "sequences, or give turbotx.optimize a larger max_cache_nbytes"
                )
            self.nbytes += nbytes
            self.peak_nbytes = max(self.peak_nbytes, self.nbytes)
