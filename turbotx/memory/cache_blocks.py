"""Cache blocks: memory for key/value caches in blocks of one size, counted by who refers to them.

In: how many blocks are wanted, shared, let go. Out: their numbers; block n begins n * block_nbytes
behind an address that never moves, and is free again when nobody refers to it any more. A budget
counts the bytes of all caches of a model::

    blocks = CacheBlocks(393216, budget.add)
    ids = blocks.take(3); blocks.share(ids[:1]); blocks.release(ids)     ->  one of them stays
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
    """Return how many bytes of addresses blocks may have: twice what the machine has of memory."""
    return 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def can_have_blocks(device: torch.device) -> bool:
    """Return whether there are ranges of addresses that grow in place: on a CPU, with mmap."""
    return device.type == "cpu" and load_libc() is not None


class CacheBlocks:
    """All blocks of a size that the caches of one model have; several threads may use it.

    references: how many refer to each block, 0 for a free one. count: told how many bytes are about
    to be taken, or negative how many are free again; it raises where they are too many.
    """

    def __init__(self, block_nbytes: int, count: Callable[[int], None]) -> None:
        self.block_nbytes = block_nbytes
        self.references = np.zeros(0, dtype=np.int32)
        self._range, self._count = CpuRange(count_addresses()), count
        self._released: deque[Ids] = deque()
        self._lock = threading.Lock()
        self.memory = view_addresses(self._range, self._range.capacity_nbytes)
        """All addresses, those of blocks that were never taken too, which must not be touched."""

    @property
    def used(self) -> int:
        """How many blocks somebody refers to."""
        return int(np.count_nonzero(self.references))

    @property
    def mapped_nbytes(self) -> int:
        """The memory that the system gives, free blocks included."""
        return self._range.mapped_nbytes

    def take(self, count: int) -> Ids:
        """Return blocks that were free, (count,), with one reference each; what they hold is
        anything.

        Raises what `count` raises, MemoryExhausted where the system has no more; then nothing was
        taken.
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
        """Count one more reference for each time a block is named."""
        with self._lock:
            np.add.at(self.references, ids, 1)
        self._settle()

    def release(self, ids: Ids) -> None:
        """Count one reference less for each time a block is named.

        It may be called while a thread is anywhere, as finalizers are: what cannot be done now is
        done by whoever is at it.
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
        """Give memory behind the last used block back where it is more than half of all."""
        used = np.flatnonzero(self.references)
        end = int(used[-1]) + 1 if len(used) else 0
        if 2 * end < len(self.references):
            self.references = self.references[:end].copy()
            self._range.unmap_to(align(end * self.block_nbytes, CHUNK_NBYTES))


class CacheBudget:
    """Counts the bytes of all caches of one model, and those of the fullest moment.

    most: how many there may be; None: any number.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most, self.nbytes, self.peak_nbytes = most, 0, 0
        self._lock = threading.RLock()  # memory may be freed wherever this thread is
        self._blocks: dict[int, CacheBlocks] = {}

    def __deepcopy__(self, memo: Any) -> CacheBudget:
        return self  # a copied cache is one more of the same model

    def __reduce__(self) -> Any:
        return CacheBudget, (self.most,)

    def blocks_of(self, nbytes: int) -> CacheBlocks:
        """Return the blocks of a size, which all caches share."""
        with self._lock:
            if nbytes not in self._blocks:
                self._blocks[nbytes] = CacheBlocks(nbytes, self.add)
            return self._blocks[nbytes]

    def stats(self) -> dict[str, int]:
        """Return what caches take: bytes, now and at the most, and blocks, those counted once that
        several share."""
        used = sum(blocks.used for blocks in list(self._blocks.values()))
        most = self.peak_nbytes
        return {"cache_nbytes": self.nbytes, "cache_peak_nbytes": most, "cache_blocks": used}

    def has_room(self, nbytes: int) -> bool:
        """Return whether so many bytes more are within the bound."""
        return self.most is None or self.nbytes + nbytes <= self.most

    def add(self, nbytes: int) -> None:
        """Count bytes that are about to be taken, or fewer where they were given back.

        Raises CacheFullError where they are too many.
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
