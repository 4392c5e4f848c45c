"""The default planner: solves a few shapes, keeps the order of buffers, evaluates offsets
elsewhere.

In: lifetimes, size classes and sizes at a seed shape, once; then sizes per shape. Out: offsets
within microseconds, without overlap at any shape (proof in docs/memory.md)::

    planner = SymbolicPlanner(workload, seed_sizes=[393_216, 1_179_648])
    planner.offsets([3_072, 9_216])        # -> ([0, 3072, 12288, ...], 21504)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from turbotx.memory.planner.choose import choose_orientations
from turbotx.memory.planner.orientation import Forms, FormTable, Orientation, live_forms
from turbotx.memory.planner.plan import ALIGNMENT, PlanError, Planner, Workload

Int64s = npt.NDArray[np.int64]

_ROUND_UP = np.int64(ALIGNMENT - 1)
_ROUND_MASK = np.int64(-ALIGNMENT)


class _Evaluator:
    """All forms of all orientations in one matrix, so that a plan is one product and one maximum.

    Row groups are the distinct offsets of each orientation, then one footprint per orientation.
    """

    def __init__(self, tables: Sequence[FormTable]) -> None:
        groups: list[Forms] = []
        self._group_of_buffer: list[Int64s] = []
        for table in tables:
            self._group_of_buffer.append(np.array(table.of_buffer, dtype=np.int64) + len(groups))
            groups.extend(table.sets)
        self._first_top = len(groups)
        groups.extend(table.top for table in tables)
        self._rows = np.concatenate(groups)
        self._starts = np.cumsum([0] + [len(group) for group in groups[:-1]])
        self.form_count = len(self._rows)

    def __call__(self, class_sizes: Int64s) -> tuple[list[int], int]:
        values = np.maximum.reduceat(self._rows @ class_sizes, self._starts)
        tops: list[int] = values[self._first_top :].tolist()
        footprint_nbytes = min(tops)
        group_of_buffer = self._group_of_buffer[tops.index(footprint_nbytes)]
        offsets: list[int] = values[group_of_buffer].tolist()
        return offsets, footprint_nbytes


class _Walker:
    """Walks the order from the bottom up, for graphs with too many forms to store."""

    def __init__(self, orientation: Orientation, size_class: Sequence[int]) -> None:
        self._orientation = orientation
        self._size_class = size_class
        self.form_count = 0

    def __call__(self, class_sizes: Int64s) -> tuple[list[int], int]:
        per_class = class_sizes.tolist()
        sizes = [per_class[c] for c in self._size_class]
        ends = [0] * len(sizes)
        for index in self._orientation.order:
            under = self._orientation.below[index]
            ends[index] = sizes[index] + max([ends[j] for j in under], default=0)
        return [e - s for e, s in zip(ends, sizes, strict=True)], max(ends, default=0)


class SymbolicPlanner(Planner):
    """Evaluates orientations of solved shapes; immutable, so threads may share it.

    in_use: the orientations it chooses from, by the smallest footprint at each shape.
    """

    def __init__(self, workload: Workload, orientations: Sequence[Orientation]) -> None:
        """orientations: of `solve_orientations`, for the same workload."""
        super().__init__(workload)
        self._count = workload.class_count
        self.live = live_forms(workload.lifetimes, workload.size_class, self._count)
        self.orientations = list(orientations)
        tables = [FormTable(o, workload.size_class, self._count) for o in self.orientations]
        kept = [table for table in tables if table.complete]
        self.in_use = [o for o, t in zip(self.orientations, tables, strict=True) if t.complete]
        self.in_use = self.in_use or self.orientations[:1]
        self._tops = [table.top for table in kept]
        self._evaluate: _Evaluator | _Walker
        if kept:
            self._evaluate = _Evaluator(kept)
        else:
            self._evaluate = _Walker(self.orientations[0], workload.size_class)

    @property
    def form_count(self) -> int:
        """Number of linear forms evaluated per plan; 0 if the order is walked instead."""
        return self._evaluate.form_count

    @property
    def optimal_everywhere(self) -> bool:
        """Whether the footprint provably equals the lower bound at all sizes, not only sampled
        ones.

        True if, for some orientation, every footprint form is covered by the live buffers of one
        launch.
        """
        return any(
            all(bool((row <= self.live).all(axis=1).any()) for row in top) for top in self._tops
        )

    def offsets(self, class_nbytes: Sequence[int]) -> tuple[Sequence[int], int]:
        """Return each buffer's offset and the arena's size, in bytes, for bytes by size class."""
        return self._evaluate(self._aligned(class_nbytes))

    def lower_bound(self, class_nbytes: Sequence[int]) -> int:
        """Return the largest sum of aligned live bytes at these sizes."""
        return int((self.live @ self._aligned(class_nbytes)).max())

    def _aligned(self, class_nbytes: Sequence[int]) -> Int64s:
        return _align(class_nbytes, self._count)


def solve_orientations(
    workload: Workload, seed_sizes: Sequence[int], sample_sizes: Sequence[Sequence[int]] = ()
) -> tuple[Orientation, ...]:
    """Return the orientations that a `SymbolicPlanner` with this seed and these samples uses."""
    count = workload.class_count
    # An empty buffer would have no position; one byte gives it one for larger shapes.
    seed = np.maximum(_align(seed_sizes, count), ALIGNMENT)
    samples = np.zeros((count, 0), dtype=np.int64)
    if len(sample_sizes):
        samples = np.stack([_align(sizes, count) for sizes in sample_sizes], axis=1)
    live = live_forms(workload.lifetimes, workload.size_class, count)
    return tuple(choose_orientations(workload, seed, samples, live))


def _align(class_nbytes: Sequence[int], count: int) -> Int64s:
    if len(class_nbytes) < count or min(class_nbytes, default=0) < 0:
        raise PlanError(f"{count} sizes of 0 bytes or more are needed, got {list(class_nbytes)}")
    sizes = np.array(class_nbytes[:count], dtype=np.int64)
    aligned: Int64s = (sizes + _ROUND_UP) & _ROUND_MASK
    return aligned
