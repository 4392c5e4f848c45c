"""The types of memory planning: lifetimes, sizes, placements, plans.

In: nothing, these are records. Out: frozen types that planners make and the checker reads.
Times are launch indices, half-open; sizes and offsets are bytes inside one arena, for example::

    Placement(Buffer("layer0.qkv", 1_179_648, Lifetime(3, 5)), offset=393_216)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from turbotx.errors import TurbotxError

ALIGNMENT = 64
"""Every offset is a multiple of this many bytes: a CPU cache line, an AVX-512 vector."""

CHUNK_NBYTES = 2 * 1024 * 1024
"""The arena's growth unit: a huge page on x86-64, the granule of CUDA's virtual memory."""


class PlanError(TurbotxError):
    """A memory plan, or the request for one, violates a rule; the message names the buffers."""


def align(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """Return the smallest multiple of `alignment` that is at least `nbytes`."""
    return -(-nbytes // alignment) * alignment


@dataclass(frozen=True, slots=True)
class Lifetime:
    """Half-open interval of launch indices: alive in launches begin, ..., end - 1."""

    begin: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end:
            raise PlanError(
                f"a lifetime must hold at least one launch and start at 0 or later, "
                f"got [{self.begin}, {self.end})"
            )

    def overlaps(self, other: Lifetime) -> bool:
        """Return whether both are alive in some launch."""
        return self.begin < other.end and other.begin < self.end


@dataclass(frozen=True, slots=True)
class Buffer:
    """A buffer at one concrete shape."""

    name: str
    nbytes: int
    lifetime: Lifetime


@dataclass(frozen=True, slots=True)
class Placement:
    """A buffer and its offset in bytes from the start of the arena."""

    buffer: Buffer
    offset: int

    @property
    def end(self) -> int:
        """Offset of the first byte after the buffer."""
        return self.offset + self.buffer.nbytes


@dataclass(frozen=True, slots=True)
class Chunk:
    """A contiguous range of the arena, in bytes."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All placements at one concrete shape, the chunks they lie in, and the plan's quality.

    `peak_nbytes` is the arena's size; `lower_bound_nbytes` is the largest sum of aligned bytes
    alive in one launch, which no plan can go below.
    """

    chunks: tuple[Chunk, ...]
    placements: tuple[Placement, ...]
    peak_nbytes: int
    lower_bound_nbytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain lists and integers, ready for JSON."""
        return {
            "peak_nbytes": self.peak_nbytes,
            "lower_bound_nbytes": self.lower_bound_nbytes,
            "alignment": ALIGNMENT,
            "chunks": [{"offset": c.offset, "nbytes": c.nbytes} for c in self.chunks],
            "placements": [
                {
                    "name": p.buffer.name,
                    "nbytes": p.buffer.nbytes,
                    "begin": p.buffer.lifetime.begin,
                    "end": p.buffer.lifetime.end,
                    "offset": p.offset,
                }
                for p in self.placements
            ],
        }


def lower_bound(buffers: Iterable[Buffer]) -> int:
    """Return the largest sum of aligned bytes alive in one launch; 0 for no buffers."""
    change: dict[int, int] = {}
    for buffer in buffers:
        nbytes = align(buffer.nbytes)
        change[buffer.lifetime.begin] = change.get(buffer.lifetime.begin, 0) + nbytes
        change[buffer.lifetime.end] = change.get(buffer.lifetime.end, 0) - nbytes
    live = peak = 0
    for time in sorted(change):
        live += change[time]
        peak = max(peak, live)
    return peak


@dataclass(frozen=True, slots=True)
class Workload:
    """The shape-independent input of a planner: lifetimes, and which buffers have equal sizes."""

    lifetimes: tuple[Lifetime, ...]
    size_class: tuple[int, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        counts = {len(self.lifetimes), len(self.size_class), len(self.names)}
        if len(counts) != 1:
            raise PlanError(
                f"lifetimes, size_class and names must be equally long, got "
                f"{len(self.lifetimes)}, {len(self.size_class)} and {len(self.names)}"
            )
        if any(c < 0 for c in self.size_class):
            raise PlanError(f"size classes are indices from 0, got {min(self.size_class)}")

    @property
    def class_count(self) -> int:
        """Number of size classes, that is, of byte counts that describe a shape."""
        return max(self.size_class, default=-1) + 1

    def aligned_sizes(self, class_nbytes: Sequence[int]) -> list[int]:
        """Return aligned bytes per buffer, from bytes per class."""
        check_class_sizes(class_nbytes, self.class_count)
        rounded = [align(int(nbytes)) for nbytes in class_nbytes]
        return [rounded[c] for c in self.size_class]

    def buffers(self, class_nbytes: Sequence[int]) -> tuple[Buffer, ...]:
        """Return the buffers at one shape.

        class_nbytes: bytes by size class; raises PlanError if too few or negative.
        """
        check_class_sizes(class_nbytes, self.class_count)
        return tuple(
            Buffer(name, int(class_nbytes[c]), lifetime)
            for name, c, lifetime in zip(self.names, self.size_class, self.lifetimes, strict=True)
        )

    def record(
        self,
        class_nbytes: Sequence[int],
        offsets: Sequence[int],
        peak_nbytes: int,
        chunks: tuple[Chunk, ...] | None = None,
    ) -> Plan:
        """Return a Plan with these offsets; by default the arena consists of whole 2 MiB chunks."""
        buffers = self.buffers(class_nbytes)
        if chunks is None:
            count = -(-peak_nbytes // CHUNK_NBYTES)
            chunks = tuple(Chunk(i * CHUNK_NBYTES, CHUNK_NBYTES) for i in range(count))
        placements = tuple(
            Placement(buffer, int(offset)) for buffer, offset in zip(buffers, offsets, strict=True)
        )
        return Plan(chunks, placements, int(peak_nbytes), lower_bound(buffers))


def check_class_sizes(class_nbytes: Sequence[int], class_count: int) -> None:
    """Raise PlanError unless there is one non-negative size for each class."""
    if len(class_nbytes) < class_count:
        raise PlanError(f"{class_count} size classes need {class_count} sizes, got {class_nbytes}")
    if class_count and min(class_nbytes) < 0:
        raise PlanError(f"sizes in bytes cannot be negative, got {list(class_nbytes)}")


class Planner(ABC):
    """Places a fixed set of lifetimes repeatedly, as sizes change with the shape."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    @abstractmethod
    def offsets(self, class_nbytes: Sequence[int]) -> tuple[Sequence[int], int]:
        """Return each buffer's offset and the arena's size, in bytes, for bytes by size class.
        Called in the hot path."""

    def plan(self, class_nbytes: Sequence[int]) -> Plan:
        """Return the same placements as a full record, for reports and the checker."""
        offsets, peak_nbytes = self.offsets(class_nbytes)
        return self._workload.record(class_nbytes, offsets, peak_nbytes)
