"""The default planner: solve one shape, keep who lies below whom, and evaluate for any other.

In: lifetimes, size classes and a seed's sizes, once; then sizes per shape. Out: offsets in
microseconds, overlap-free for every shape (docs/memory.md has the proof)::

    planner = SymbolicPlanner(workload, seed_sizes=[393_216, 1_179_648])
    planner.offsets([3_072, 9_216])        # -> ([0, 3072, 12288, ...], 21504)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from turbotx.memory.orientation import FormTable, live_forms, orient
from turbotx.memory.plan import ALIGNMENT, Plan, PlanError, Workload, check_class_sizes
from turbotx.memory.solve import solve

Int64s = npt.NDArray[np.int64]


class _Orientation:
    """One order of the buffers, evaluated for all sizes at once; immutable after it is built."""

    def __init__(self, workload: Workload, offsets: Sequence[int]) -> None:
        self.order, self.below = orient(workload.lifetimes, offsets)
        self._size_class = workload.size_class
        table = FormTable(self.order, self.below, workload.size_class, workload.class_count)
        self.complete = table.complete
        if not table.complete:
            return
        self.top = table.top
        self.form_count = sum(len(forms) for forms in table.sets)
        self._rows = np.concatenate(table.sets) if table.sets else np.zeros((0, 0), np.int64)
        self._starts = np.cumsum([0] + [len(forms) for forms in table.sets[:-1]])
        self._of_buffer = np.array(table.of_buffer, dtype=np.int64)

    def offsets(self, class_sizes: Int64s) -> list[int]:
        if not self._size_class:
            return []
        if not self.complete:
            return self._walk(class_sizes.tolist())
        per_set = np.maximum.reduceat(self._rows @ class_sizes, self._starts)
        offsets: list[int] = per_set[self._of_buffer].tolist()
        return offsets

    def _walk(self, class_sizes: Sequence[int]) -> list[int]:
        offsets = [0] * len(self.order)
        for index in self.order:
            offsets[index] = max(
                (offsets[j] + class_sizes[self._size_class[j]] for j in self.below[index]),
                default=0,
            )
        return offsets

    def footprint(self, class_sizes: Int64s) -> int:
        if self.complete:
            return int((self.top @ class_sizes).max())
        offsets = self._walk(class_sizes.tolist())
        return max(o + int(class_sizes[c]) for o, c in zip(offsets, self._size_class, strict=True))


class SymbolicPlanner:
    """Evaluates the orientation of a solved seed; nothing in it changes, so threads share it."""

    def __init__(self, workload: Workload, seed_sizes: Sequence[int]) -> None:
        check_class_sizes(seed_sizes, workload.class_count)
        self._workload = workload
        seed = solve(workload.lifetimes, workload.aligned_sizes(seed_sizes))
        self._orientation = _Orientation(workload, seed.offsets)
        self._live = live_forms(workload.lifetimes, workload.size_class, workload.class_count)

    def offsets(self, class_nbytes: Sequence[int]) -> tuple[Sequence[int], int]:
        class_sizes = self._aligned(class_nbytes)
        return self._orientation.offsets(class_sizes), self._orientation.footprint(class_sizes)

    def lower_bound(self, class_nbytes: Sequence[int]) -> int:
        """The largest sum of aligned live bytes at these sizes."""
        return int((self._live @ self._aligned(class_nbytes)).max())

    def plan(self, class_nbytes: Sequence[int]) -> Plan:
        offsets, peak_nbytes = self.offsets(class_nbytes)
        return self._workload.record(class_nbytes, offsets, peak_nbytes)

    def _aligned(self, class_nbytes: Sequence[int]) -> Int64s:
        count = self._workload.class_count
        sizes = np.array(class_nbytes[:count], dtype=np.int64)
        if len(sizes) < count or (count and int(sizes.min()) < 0):
            raise PlanError(f"{count} sizes of 0 bytes or more are needed, got {class_nbytes}")
        return (sizes + (ALIGNMENT - 1)) & -ALIGNMENT
