"""The chunked first-fit planner of TurboTransformers (PPoPP'21, arXiv 2010.05680), for comparison.

In: lifetimes and, per shape, sizes. Out: offsets into chunks that persist between plans. Chunks
that a plan leaves empty are freed; every new one is a device allocation::

    planner.offsets([393_216, 1_179_648])   # -> ([0, 393_216, ...], 2_097_152)
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from turbotx.memory.planner.plan import CHUNK_NBYTES, Chunk, Plan, Planner, Workload, align

K_SCALE_PERCENT = 120
"""A tensor larger than a chunk gets a chunk of 1.2 times its size (the paper's K_SCALE)."""

SIZE_ALIGNMENT = 32
"""The paper rounds the size of a chunk up to 32 bytes."""


@dataclass(slots=True)
class _OpenChunk:
    nbytes: int
    placed: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    """(offset, nbytes, begin, end, buffer index), by ascending offset."""


class ChunkedPlanner(Planner):
    """Keeps chunks between plans; `allocations` and `frees` count device calls so far.

    Offsets are those of the paper's chunks laid end to end, each at the next aligned byte.
    Thread-safe; plans run one at a time, since each changes the chunks.
    """

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self._chunks: list[_OpenChunk] = []
        self._lock = threading.Lock()
        self.allocations = 0
        self.frees = 0

    def offsets(self, class_nbytes: Sequence[int]) -> tuple[Sequence[int], int]:
        """Return each buffer's offset and the arena's size, in bytes, for bytes by size class.
        Depends on earlier calls: chunks persist."""
        with self._lock:
            return self._place(class_nbytes)[:2]

    def plan(self, class_nbytes: Sequence[int]) -> Plan:
        """Return the plan for bytes by size class, with its chunks."""
        with self._lock:
            offsets, _, chunks = self._place(class_nbytes)
        # The arena ends where its last chunk ends, even if that chunk is not full.
        peak_nbytes = max((c.offset + c.nbytes for c in chunks), default=0)
        return self._workload.record(class_nbytes, offsets, peak_nbytes, chunks)

    def _place(self, class_nbytes: Sequence[int]) -> tuple[list[int], int, tuple[Chunk, ...]]:
        sizes = self._workload.aligned_sizes(class_nbytes)
        for chunk in self._chunks:
            chunk.placed.clear()
        for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            self._place_one(index, sizes[index])
        kept = [chunk for chunk in self._chunks if chunk.placed]
        self.frees += len(self._chunks) - len(kept)
        self._chunks = kept
        offsets = [0] * len(sizes)
        layout = []
        base = end = 0
        for chunk in kept:
            for offset, _, _, _, index in chunk.placed:
                offsets[index] = base + offset
            layout.append(Chunk(base, chunk.nbytes))
            end = base + chunk.nbytes
            base = align(end)
        return offsets, end, tuple(layout)

    def _place_one(self, index: int, nbytes: int) -> None:
        if not nbytes:
            return
        lifetime = self._workload.lifetimes[index]
        for chunk in sorted(self._chunks, key=lambda c: c.nbytes):
            offset = _find_gap(chunk, nbytes, lifetime.begin, lifetime.end)
            if offset is not None:
                break
        else:
            grown = align(-(-nbytes * K_SCALE_PERCENT // 100), SIZE_ALIGNMENT)
            chunk = _OpenChunk(max(CHUNK_NBYTES, grown))
            self._chunks.append(chunk)
            self.allocations += 1
            offset = 0
        chunk.placed.append((offset, nbytes, lifetime.begin, lifetime.end, index))
        chunk.placed.sort()


def _find_gap(chunk: _OpenChunk, nbytes: int, begin: int, end: int) -> int | None:
    """Return the tightest gap between buffers alive at the same time, else the space after the
    last; None if neither fits."""
    previous_end = 0
    best: int | None = None
    tightest = chunk.nbytes + 1
    for offset, placed_nbytes, placed_begin, placed_end, _ in chunk.placed:
        if placed_begin >= end or begin >= placed_end:
            continue
        gap = offset - previous_end
        if nbytes <= gap < tightest:
            best, tightest = previous_end, gap
        previous_end = max(previous_end, offset + placed_nbytes)
    if best is None and chunk.nbytes - previous_end >= nbytes:
        best = previous_end
    return best
