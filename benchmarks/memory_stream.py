"""A stream of requests of changing shapes, and what each way of keeping memory makes of it.

In: a sized launch list. Out: device allocations and peaks over 500 requests, for turbotx's pool
under each planner and for a model of PyTorch's caching allocator::

    run_stream(model, count=500)["symbolic"]["peak_nbytes"]
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from turbotx.memory.planner import CHUNK_NBYTES, make_planner
from turbotx.memory.pool import ChunkPool

_MIB = 1 << 20


@dataclass(eq=False)
class _Block:
    """A piece of a segment; neighbours are in the same segment."""

    address: int
    nbytes: int
    free: bool = True
    before: _Block | None = None
    after: _Block | None = None


@dataclass
class CachingAllocator:
    """The rules of PyTorch's CUDA caching allocator at its default settings, without a device.

    Requests are rounded to 512 bytes. Up to 1 MiB they are cut from 2 MiB segments; below 10 MiB
    from 20 MiB segments; larger ones get a segment rounded to 2 MiB. The smallest free block
    that fits is used, and split if more than 512 bytes (small) or 1 MiB (large) remain.
    """

    reserved_nbytes: int = 0
    allocations: int = 0
    _free: dict[bool, list[tuple[int, int, _Block]]] = field(
        default_factory=lambda: {True: [], False: []}
    )
    _next_address: int = 0

    def take(self, nbytes: int) -> _Block:
        nbytes = max(512, -(-nbytes // 512) * 512)
        small = nbytes <= _MIB
        free = self._free[small]
        at = bisect_left(free, (nbytes, -1))  # type: ignore[arg-type]
        if at < len(free):
            block = free.pop(at)[2]
        else:
            block = self._new_segment(nbytes)
        left = block.nbytes - nbytes
        if left >= 512 if small else left > _MIB:
            rest = _Block(block.address + nbytes, left, True, block, block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.nbytes = rest, nbytes
            insort(free, (rest.nbytes, rest.address, rest))
        block.free = False
        return block

    def give_back(self, block: _Block, nbytes: int) -> None:
        free = self._free[max(512, nbytes) <= _MIB]
        block.free = True
        for other in (block.before, block.after):
            if other is not None and other.free:
                free.remove((other.nbytes, other.address, other))
        if block.before is not None and block.before.free:
            block.before.nbytes += block.nbytes
            block.before.after = block.after
            if block.after is not None:
                block.after.before = block.before
            block = block.before
        if block.after is not None and block.after.free:
            block.nbytes += block.after.nbytes
            block.after = block.after.after
            if block.after is not None:
                block.after.before = block
        insort(free, (block.nbytes, block.address, block))

    def _new_segment(self, nbytes: int) -> _Block:
        if nbytes <= _MIB:
            segment = 2 * _MIB
        elif nbytes < 10 * _MIB:
            segment = 20 * _MIB
        else:
            segment = -(-nbytes // (2 * _MIB)) * 2 * _MIB
        self.allocations += 1
        self.reserved_nbytes += segment
        self._next_address += segment
        return _Block(self._next_address - segment, segment)


def replay(allocator: CachingAllocator, model: Any, classes: list[int]) -> None:
    """One execution: every buffer is taken at its first launch and given back after its last."""
    begins: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    for index, life in enumerate(model.lifetimes):
        begins.setdefault(life.begin, []).append(index)
        ends.setdefault(life.end, []).append(index)
    held: dict[int, _Block] = {}
    for launch in range(model.launch_count + 1):
        for index in ends.get(launch, ()):
            allocator.give_back(held.pop(index), classes[model.size_class[index]])
        for index in begins.get(launch, ()):
            held[index] = allocator.take(classes[model.size_class[index]])


def run_stream(model: Any, count: int) -> dict[str, Any]:
    """Batch uniform in 1..20, length uniform in 8..512, seed 0; memory counted, none touched."""
    random = np.random.default_rng(0)
    shapes = [(int(random.integers(1, 21)), int(random.integers(8, 513))) for _ in range(count)]
    stream = [model.class_nbytes(batch, seq).tolist() for batch, seq in shapes]
    seed = model.class_nbytes(8, 128).tolist()

    def planner(kind: str) -> Any:
        return make_planner(
            kind, model.lifetimes, model.size_class, model.names, seed, model.samples()
        )

    symbolic = planner("symbolic")
    largest_bound = max(symbolic.lower_bound(classes) for classes in stream)
    reserved = symbolic.offsets(model.class_nbytes(20, 512).tolist())[1]
    caching = CachingAllocator()
    for classes in stream:
        replay(caching, model, classes)
    rows = {
        "symbolic": _through_pool(symbolic, stream, None),
        "symbolic, reserved for (20, 512)": _through_pool(symbolic, stream, reserved),
        "greedy": _through_pool(planner("greedy"), stream, None),
        "chunked": _through_chunks(planner("chunked"), stream),
        "caching allocator": {
            "device_allocations": caching.allocations,
            "peak_nbytes": caching.reserved_nbytes,
        },
    }
    for row in rows.values():
        row["peak_over_largest_bound"] = round(row["peak_nbytes"] / largest_bound, 4)
    within = rows["symbolic"]["peak_nbytes"] <= largest_bound + CHUNK_NBYTES
    return {
        "model": model.name,
        "requests": count,
        "largest_lower_bound_nbytes": largest_bound,
        "symbolic_peak_within_bound_plus_one_chunk": bool(within),
        "ways": rows,
    }


def _through_pool(planner: Any, stream: list[list[int]], reserve_nbytes: int | None) -> dict:
    pool = ChunkPool(torch.device("cpu"), max_arenas=1)
    if reserve_nbytes is not None:
        pool.reserve(reserve_nbytes)
    grown_at = []
    for index, classes in enumerate(stream):
        before = pool.stats().chunk_allocations
        with pool.lease(planner.offsets(classes)[1]):
            pass
        if pool.stats().chunk_allocations > before:
            grown_at.append(index)
    stats = pool.stats()
    again = stats.chunk_allocations
    for classes in stream:  # warm: the same shapes once more
        with pool.lease(planner.offsets(classes)[1]):
            pass
    return {
        "device_allocations": stats.chunk_allocations,
        "device_allocations_when_warm": pool.stats().chunk_allocations - again,
        "grown_at_requests": grown_at,
        "peak_nbytes": stats.peak_nbytes,
        "trims": stats.trims,
    }


def _through_chunks(planner: Any, stream: list[list[int]]) -> dict:
    peak = max(planner.offsets(classes)[1] for classes in stream)
    return {
        "device_allocations": planner.allocations,
        "device_frees": planner.frees,
        "peak_nbytes": peak,
    }
