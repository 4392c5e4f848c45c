"""The chunk pool: arenas of 2 MiB chunks that outlive the shapes planned into them.

In: how many bytes an execution needs. Out: an arena for that execution, reusing the same memory at
the same address; further executions wait instead of allocating more::

    pool = ChunkPool(torch.device("cpu"), max_arenas=2)
    with pool.lease(3_000_000) as arena:
        hidden = arena.tensor[1024:5120].view(torch.float32)
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from turbotx.errors import TurbotxError
from turbotx.memory.arena import AddressRange, Arena, open_range
from turbotx.memory.cpu_range import MemoryExhausted
from turbotx.memory.planner.plan import CHUNK_NBYTES, align

log = logging.getLogger("turbotx.memory")

ADDRESS_NBYTES = 1 << 40
"""Addresses reserved per arena, at most; without cost until used."""

POISON_BYTE = 0xFF
"""All bits set: NaN in every floating type, -1 in every signed integer type."""


class PoolBusy(TurbotxError):
    """All arenas stayed leased for longer than the caller's timeout."""


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Statistics of a pool: bytes summed over arenas, counts since the pool was made.

    `chunk_allocations` counts allocation requests to the device, each for one chunk or more;
    `peak_nbytes` is the maximum mapped; `waits` counts leases that found every arena taken.
    """

    mapped_nbytes: int
    used_nbytes: int
    peak_nbytes: int
    chunk_allocations: int
    trims: int
    waits: int
    arenas: int

    def to_dict(self) -> dict[str, int]:
        """Return the fields by name."""
        return asdict(self)


def poison_enabled() -> bool:
    """Return whether TURBOTX_POISON=1 is set: memory is then filled with NaN before use."""
    return os.environ.get("TURBOTX_POISON", "0") not in ("", "0")


def poison(arena_tensor: torch.Tensor) -> None:
    """Fill a uint8 tensor with bytes that read as NaN in every floating type."""
    arena_tensor.fill_(POISON_BYTE)


class Lease:
    """Context manager that holds an arena; made by `ChunkPool.lease`."""

    __slots__ = ("_arena", "_nbytes", "_poisoned", "_pool", "_timeout_s")

    def __init__(
        self, pool: ChunkPool, nbytes: int, timeout_s: float | None, poisoned: bool
    ) -> None:
        self._pool, self._nbytes, self._timeout_s = pool, nbytes, timeout_s
        self._poisoned = poisoned
        self._arena: Arena | None = None

    def __enter__(self) -> Arena:
        arena = self._pool._take(self._nbytes, self._timeout_s)
        self._arena = arena
        try:
            if arena.order is not None:
                arena.order.enter()
            if self._poisoned:
                poison(arena.tensor)
        except BaseException:
            self.__exit__()
            raise
        return arena

    def __exit__(self, *error: object) -> None:
        arena, self._arena = self._arena, None
        if arena is not None:
            try:
                if arena.order is not None:
                    arena.order.leave()
            finally:
                self._pool._give_back(arena)


class ChunkPool:
    """Leases arenas; thread-safe.

    `max_arenas` limits concurrent executions, `limit_nbytes` the total mapped by all arenas. An
    arena that needed at most half its memory for `trim_after` leases in a row is trimmed to what
    they needed, but not below what `reserve` mapped.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        max_arenas: int = 4,
        limit_nbytes: int | None = None,
        trim_after: int = 256,
        open_memory: Callable[[torch.device, int], AddressRange] = open_range,
    ) -> None:
        if max_arenas < 1:
            raise ValueError(f"a pool needs at least one arena, got max_arenas={max_arenas}")
        self.device = device
        self.max_arenas = max_arenas
        self.limit_nbytes = limit_nbytes
        self.trim_after = trim_after
        self._open_memory = open_memory
        self._changed = threading.Condition()
        self._arenas: list[Arena] = []
        self._idle: list[Arena] = []
        self._quiet_leases: dict[int, int] = {}
        self._quiet_peak: dict[int, int] = {}
        self._reserved_nbytes = 0
        self._used_nbytes = self._peak_nbytes = 0
        self._waiting = 0
        self._chunk_allocations = self._trims = self._waits = 0

    def lease(
        self, nbytes: int, timeout_s: float | None = None, poisoned: bool | None = None
    ) -> Lease:
        """Return a context manager: an arena of at least `nbytes`, for exclusive use.

        poisoned: whether it is first filled with NaN; None for TURBOTX_POISON's setting. Waits
        while `max_arenas` are taken, or while others hold the memory needed. Raises PoolBusy after
        waiting `timeout_s` seconds, MemoryExhausted if waiting cannot help.
        """
        if poisoned is None:
            poisoned = poison_enabled()
        return Lease(self, nbytes, timeout_s, poisoned)

    def ensure(self, nbytes: int) -> Arena:
        """Return the pool's first arena, grown to `nbytes`; for callers that never run
        concurrently."""
        with self._changed:
            arena = self._arenas[0] if self._arenas else self._open_arena()
            self._grow(arena, nbytes)
            return arena

    def reserve(self, nbytes: int, arenas: int = 1) -> None:
        """Map `nbytes` in each of the first `arenas` arenas, now and permanently. Raises ValueError
        for less than one arena or more than `max_arenas`."""
        if not 1 <= arenas <= self.max_arenas:
            raise ValueError(f"cannot reserve {arenas} of {self.max_arenas} arenas")
        with self._changed:
            while len(self._arenas) < arenas:
                self._open_arena()
            for arena in self._arenas[:arenas]:
                self._grow(arena, nbytes)
            self._reserved_nbytes = max(self._reserved_nbytes, nbytes)

    def trim(self, keep_nbytes: int = 0) -> int:
        """Trim idle arenas to `keep_nbytes` or what is reserved; return the number of bytes
        freed."""
        with self._changed:
            freed = self._shrink_idle(keep_nbytes)
            self._changed.notify_all()
            return freed

    def stats(self) -> PoolStats:
        """Return the pool's current statistics."""
        with self._changed:
            return PoolStats(
                mapped_nbytes=self._mapped_nbytes(),
                used_nbytes=self._used_nbytes,
                peak_nbytes=self._peak_nbytes,
                chunk_allocations=self._chunk_allocations,
                trims=self._trims,
                waits=self._waits,
                arenas=len(self._arenas),
            )

    def _take(self, nbytes: int, timeout_s: float | None) -> Arena:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        waited = False
        with self._changed:
            while True:
                arena = self._try_take(nbytes)
                if arena is not None:
                    return arena
                if not waited:
                    self._waits += 1
                    waited = True
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise PoolBusy(
                        f"all {len(self._arenas)} arenas stayed in use for {timeout_s} s; raise "
                        f"max_arenas or send fewer requests at once"
                    )
                self._waiting += 1
                try:
                    self._changed.wait(left)
                finally:
                    self._waiting -= 1

    def _try_take(self, nbytes: int) -> Arena | None:
        """Return an arena; None if another lease must end first."""
        if not self._idle and len(self._arenas) >= self.max_arenas:
            return None
        arena = self._pick_idle(nbytes) if self._idle else self._open_arena()
        if nbytes > arena.mapped_nbytes:
            try:
                self._grow(arena, nbytes)
            except MemoryExhausted:
                if len(self._idle) < len(self._arenas):  # memory of other leases may become free
                    return None
                raise
        self._idle.remove(arena)
        arena.used_nbytes = nbytes
        self._used_nbytes += nbytes
        return arena

    def _pick_idle(self, nbytes: int) -> Arena:
        """Return the smallest idle arena that is large enough, else the largest."""
        if len(self._idle) == 1:
            return self._idle[0]
        fitting = [a for a in self._idle if a.mapped_nbytes >= nbytes]
        if fitting:
            return min(fitting, key=lambda a: (a.mapped_nbytes, a.index))
        return max(self._idle, key=lambda a: (a.mapped_nbytes, -a.index))

    def _give_back(self, arena: Arena) -> None:
        with self._changed:
            try:
                self._note_need(arena)
            finally:  # even if trimming fails, the arena is available again
                self._used_nbytes -= arena.used_nbytes
                arena.used_nbytes = 0
                self._idle.append(arena)
                if self._waiting:
                    self._changed.notify_all()  # the first to wake may need more than this frees

    def _note_need(self, arena: Arena) -> None:
        """Trim with hysteresis: only after a long run of leases that needed half or less."""
        if 2 * arena.used_nbytes > arena.mapped_nbytes:
            self._quiet_leases[arena.index] = self._quiet_peak[arena.index] = 0
            return
        count = self._quiet_leases.get(arena.index, 0) + 1
        peak = max(self._quiet_peak.get(arena.index, 0), arena.used_nbytes)
        if count >= self.trim_after:
            self._shrink(arena, peak)
            count = peak = 0
        self._quiet_leases[arena.index], self._quiet_peak[arena.index] = count, peak

    def _open_arena(self) -> Arena:
        memory = self._open_memory(self.device, ADDRESS_NBYTES)
        arena = Arena(memory, self.device, len(self._arenas), CHUNK_NBYTES)
        self._arenas.append(arena)
        self._idle.append(arena)
        return arena

    def _grow(self, arena: Arena, nbytes: int) -> None:
        if nbytes <= arena.mapped_nbytes:
            return
        self._make_room(arena, nbytes)
        try:
            arena.grow(nbytes)
        except MemoryExhausted:
            if not self._shrink_idle(0, except_for=arena):
                raise
            arena.grow(nbytes)
        self._chunk_allocations += 1
        log.debug("an arena on %s grew to %d bytes", self.device, arena.mapped_nbytes)
        self._peak_nbytes = max(self._peak_nbytes, self._mapped_nbytes())

    def _make_room(self, arena: Arena, nbytes: int) -> None:
        """Keep the pool within its limit by trimming idle arenas; raises MemoryExhausted."""
        if self.limit_nbytes is None:
            return
        grown = align(nbytes, CHUNK_NBYTES) - arena.mapped_nbytes
        if self._mapped_nbytes() + grown > self.limit_nbytes:
            self._shrink_idle(0, except_for=arena)
        if self._mapped_nbytes() + grown > self.limit_nbytes:
            raise MemoryExhausted(
                f"{nbytes} bytes are needed, but the pool may map {self.limit_nbytes} and has "
                f"mapped {self._mapped_nbytes()}; raise limit_nbytes, or use smaller batches or "
                f"shorter sequences"
            )

    def _shrink_idle(self, keep_nbytes: int, except_for: Arena | None = None) -> int:
        before = self._mapped_nbytes()
        for arena in self._idle:
            if arena is not except_for:
                self._shrink(arena, keep_nbytes)
        return before - self._mapped_nbytes()

    def _shrink(self, arena: Arena, keep_nbytes: int) -> None:
        keep_nbytes = align(max(keep_nbytes, self._reserved_nbytes), CHUNK_NBYTES)
        if keep_nbytes < arena.mapped_nbytes:
            arena.shrink(keep_nbytes)
            self._trims += 1

    def _mapped_nbytes(self) -> int:
        return sum(arena.mapped_nbytes for arena in self._arenas)
