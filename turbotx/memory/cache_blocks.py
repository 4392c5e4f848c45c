"""Cache blocks: reference-counted memory blocks of one size for key/value caches.

In: how many blocks to allocate, share or release. Out: block ids. Block n begins n * block_nbytes
after an address that never moves, and is free when its reference count drops to 0. A budget counts
the bytes of all caches of a model::

    blocks = CacheBlocks(393216, budget.add)
    ids = blocks.take(3); blocks.share(ids[:1]); blocks.release(ids)     ->  one stays in use
"""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from turbotx.errors import CacheFullError
from turbotx.memory.arena import StreamOrders, open_range, view_addresses
from turbotx.memory.capture_lock import capture_lock
from turbotx.memory.planner.plan import CHUNK_NBYTES, align

Ids = NDArray[np.int64]


SHOWN = 4
"""Blocks that PyTorch may read at either end of a tensor over all of them, to show three."""
QUIET = 256
"""How often in a row blocks of a GPU are let go before memory behind the last used one goes back:
that waits for the device."""


def count_addresses(device: torch.device) -> int:
    """Return how many bytes of addresses blocks may have: twice what the device has of memory."""
    if device.type == "cuda":
        return 2 * int(torch.cuda.get_device_properties(device).total_memory)
    return 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.cache
def can_have_blocks(device: torch.device) -> bool:
    """Return whether there are ranges of addresses on a device that grow in place: with mmap on a
    CPU, with the driver's virtual memory on a GPU."""
    there = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())
    return there and open_range(device, CHUNK_NBYTES).stable


class CacheBlocks:
    """All blocks of a size that the caches of one model have; several threads may use it, on a GPU
    on several streams: the next user of a block waits for the previous ones (`note_use`).

    references: how many refer to each block, 0 for a free one. count: told how many bytes are about
    to be taken, or negative how many are free again; it raises where they are too many. device: one
    that `can_have_blocks`.
    """

    def __init__(
        self, block_nbytes: int, count: Callable[[int], None], device: torch.device
    ) -> None:
        self.block_nbytes = block_nbytes
        self.references = np.zeros(0, dtype=np.int32)
        self._range = cast(Any, open_range(device, count_addresses(device)))
        self._count, self._quiet = count, 0
        self._orders = StreamOrders(device) if device.type == "cuda" else None
        self._released: deque[Ids] = deque()
        self._lock = threading.Lock()
        # On a GPU this maps some, so that PyTorch finds out whose memory an address is.
        self._range.make_readable(SHOWN * block_nbytes)
        self.memory = view_addresses(self._range, self._range.capacity_nbytes, device)
        """All addresses, also of blocks that were never taken: those must not be used."""

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
            if self._orders is not None:
                self._orders.enter()
        self._settle()
        return free

    def note_use(self) -> None:
        """Record that blocks are in use by what the current stream has queued by now."""
        if self._orders is not None:
            with self._lock:
                self._orders.leave()

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

    def find_shared(self, ids: Ids) -> NDArray[np.bool_]:
        """Return which cells of a table need a new block to be written: empty ones (-1), and those
        whose block is shared. If all references to a block are among these cells, the first one
        keeps it."""
        if not (ids >= 0).any():  # a new column, as every 64 steps
            return np.ones(ids.shape, np.bool_)
        known, where, inverse, named = np.unique(
            ids, return_index=True, return_inverse=True, return_counts=True
        )
        references = np.zeros(len(known), np.int64)
        references[known >= 0] = self.references[known[known >= 0]]
        shared = (references != 1)[inverse.reshape(-1)]
        shared[where[(references == named) & (known >= 0)]] = False
        return shared.reshape(ids.shape)

    def find_equal(self, a: torch.Tensor, b: torch.Tensor, first_nbytes: int) -> NDArray[np.bool_]:
        """Return which pairs of blocks hold the same bytes; a, b: ids, int64 (pairs,).

        The first bytes of all pairs are compared at once, and only where those agree the rest.
        """
        words = self.memory.view(torch.int64)
        size = self.block_nbytes // words.itemsize
        words = words[: len(words) // size * size].view(-1, size)
        starts = words[:, : max(1, first_nbytes // words.itemsize)]
        equal: NDArray[np.bool_] = (starts[a] == starts[b]).all(1).cpu().numpy()
        pairs = zip(a[equal].tolist(), b[equal].tolist(), strict=True)
        whole = [(words[i] == words[j]).all() for i, j in pairs]
        if whole:
            equal[equal] = torch.stack(whole).cpu().numpy()
        return equal

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
        self._quiet = self._quiet + 1 if 2 * end < len(self.references) else 0
        on_gpu = self._orders is not None
        if self._quiet > QUIET * on_gpu and not capture_lock.is_held_here:
            self.references, self._quiet = self.references[:end].copy(), 0
            self._range.unmap_to(align(max(on_gpu, end * self.block_nbytes), CHUNK_NBYTES))


class CacheBudget:
    """Counts the bytes of all caches of one model, and their peak.

    most: the limit; None for no limit.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most, self.nbytes, self.peak_nbytes = most, 0, 0
        self._lock = threading.RLock()  # reentrant: finalizers may run in this thread at any point
        self._blocks: dict[tuple[int, torch.device], CacheBlocks] = {}

    def __deepcopy__(self, memo: Any) -> CacheBudget:
        return self  # a copied cache belongs to the same model

    def __reduce__(self) -> Any:
        return CacheBudget, (self.most,)

    def blocks_of(self, nbytes: int, device: torch.device) -> CacheBlocks:
        """Return the blocks of a size on a device, shared by all caches."""
        with self._lock:
            if (nbytes, device) not in self._blocks:
                self._blocks[nbytes, device] = CacheBlocks(nbytes, self.add, device)
            return self._blocks[nbytes, device]

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
