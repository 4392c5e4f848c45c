"""A range of CPU addresses, reserved as a whole and backed with memory chunk by chunk.

In: byte counts. Out: memory at a fixed address, advised to use huge pages. Linux and macOS, by
mmap, mprotect and madvise through ctypes::

    memory = CpuRange(1 << 40); memory.map_to(2 << 20); memory.address   # a multiple of 2 MiB
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Callable

from turbotx.errors import TurbotxError
from turbotx.memory.planner.plan import CHUNK_NBYTES, align

_PROT_NONE = 0
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value
_LEAST_ADDRESS_NBYTES = 1 << 30
# The largest page size of any Linux: protection works by pages.
MARGIN_NBYTES = 64 * 1024


class MemoryExhausted(TurbotxError):
    """Not enough memory for a plan; memory mapped before stays mapped and valid."""


def load_libc() -> ctypes.CDLL | None:
    """Return the C library with the calls declared; None if the system has no mmap."""
    if os.name != "posix":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    ]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def available_nbytes() -> int | None:
    """Return the memory and swap that the system can still provide, in bytes; None if unknown."""
    return _sum_of_meminfo("MemAvailable", "SwapFree")


def total_nbytes() -> int | None:
    """Return the system's memory and swap in bytes; None if unknown."""
    return _sum_of_meminfo("MemTotal", "SwapTotal")


def _sum_of_meminfo(*keys: str) -> int | None:
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return sum(int(fields[key].split()[0]) * 1024 for key in keys)
    except (OSError, KeyError, ValueError):
        return None


class CpuRange:
    """A reserved address range, of which bytes [address, address + mapped_nbytes) are ordinary
    memory.

    No more addresses are reserved than twice the system's memory: a process has 128 TiB of them, of
    which each arena of each optimized model takes a part. One page on either side is also readable,
    for vector loads that extend past an end. Memory returned by `unmap_to` stays readable (as
    zeros) but holds no pages, so that a stale view reads wrong values instead of crashing the
    process. Raises MemoryExhausted.
    """

    stable = True

    def __init__(self, address_nbytes: int, available: Callable[[], int | None] = available_nbytes):
        libc = load_libc()
        if libc is None:
            raise MemoryExhausted("this system has no mmap to reserve addresses with")
        self._libc = libc
        self._available = available
        self._protected_nbytes = 0
        self.mapped_nbytes = 0
        total = total_nbytes()
        wish = address_nbytes if total is None else min(address_nbytes, 2 * total)
        self.capacity_nbytes = align(wish, CHUNK_NBYTES)
        raw = self._reserve()
        self.address = align(raw + MARGIN_NBYTES, CHUNK_NBYTES)
        self.close = weakref.finalize(self, libc.munmap, raw, self._reserved_nbytes)

    @property
    def _reserved_nbytes(self) -> int:
        """Includes room for aligning the start to a chunk, and both margins."""
        return self.capacity_nbytes + CHUNK_NBYTES + 2 * MARGIN_NBYTES

    def _reserve(self) -> int:
        """Reserve addresses, halving the size until it fits the process's address space limit."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if os.uname().sysname == "Linux":
            flags |= _MAP_NORESERVE
        while True:
            nbytes = self._reserved_nbytes
            raw = self._libc.mmap(None, nbytes, _PROT_NONE, flags, -1, 0)
            if raw != _MAP_FAILED:
                return int(raw)
            code = ctypes.get_errno()
            if self.capacity_nbytes <= _LEAST_ADDRESS_NBYTES or code != errno.ENOMEM:
                raise MemoryExhausted(
                    f"cannot reserve {nbytes} bytes of addresses: {os.strerror(code)}; "
                    f"raise the address space limit (ulimit -v)"
                )
            self.capacity_nbytes = align(self.capacity_nbytes // 2, CHUNK_NBYTES)

    def map_to(self, nbytes: int) -> None:
        """Back the first `nbytes` (a multiple of 2 MiB); never shrinks. Raises MemoryExhausted
        beyond the reserved addresses or the system's memory."""
        if nbytes <= self.mapped_nbytes:
            return
        wanted = nbytes - self.mapped_nbytes
        if nbytes > self.capacity_nbytes:
            raise MemoryExhausted(
                f"an arena of {nbytes} bytes exceeds the {self.capacity_nbytes} bytes of "
                f"addresses reserved for it"
            )
        available = self._available()
        if available is not None and wanted > available:
            raise MemoryExhausted(
                f"{wanted} more bytes are needed for an arena of {nbytes}, but the system has "
                f"only {available} left; use smaller batches or shorter sequences"
            )
        self._protect(nbytes)
        self.mapped_nbytes = nbytes

    def _protect(self, nbytes: int) -> None:
        grown = nbytes - self._protected_nbytes
        if grown <= 0:
            return
        start = self.address + self._protected_nbytes
        margins = (start - MARGIN_NBYTES, grown + 2 * MARGIN_NBYTES)
        if self._libc.mprotect(*margins, mmap.PROT_READ | mmap.PROT_WRITE):
            code = ctypes.get_errno()
            raise MemoryExhausted(f"the system refused {grown} bytes: {os.strerror(code)}")
        huge = getattr(mmap, "MADV_HUGEPAGE", None)
        if huge is not None:
            self._libc.madvise(start, grown, huge)  # only advice: failure costs speed, nothing else
        self._protected_nbytes = nbytes

    def make_readable(self, nbytes: int) -> None:
        """Let all addresses be read, not only the first and last `nbytes`, as zeros that hold no
        pages: a debugger or a traceback may show a tensor over them. Writes beyond what is mapped
        still end the process."""
        beyond = self.address + self._protected_nbytes
        nbytes = self.capacity_nbytes - self._protected_nbytes
        self._libc.mprotect(beyond, nbytes, mmap.PROT_READ)  # failure: they stay unreadable

    def unmap_to(self, nbytes: int) -> None:
        """Return the memory above the first `nbytes` (a multiple of 2 MiB) to the system."""
        if nbytes >= self.mapped_nbytes:
            return
        self._libc.madvise(self.address + nbytes, self.mapped_nbytes - nbytes, mmap.MADV_DONTNEED)
        self.mapped_nbytes = nbytes
