"""Orientation: which buffer lies below which; gives each offset as a maximum of linear forms.

In: one solved placement. Out: for each buffer, rows of class counts; its offset at any shape is the
largest `row · class sizes`. docs/memory.md proves that buffers overlap at no shape::

    offset(ctx) = max(1·hidden + 3·heads, 4·hidden)   # rows [[1, 3], [4, 0]]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from turbotx.memory.planner.plan import Lifetime

Forms = npt.NDArray[np.int64]
"""Rows of class counts, shape (forms, classes); no row is <= another in every column."""

MAX_FORMS = 96
"""With more forms than this, offsets are computed by walking the order instead."""


@dataclass(frozen=True, slots=True)
class Orientation:
    """Buffers from the bottom up (`order`), and for each the buffers directly `below` it."""

    order: tuple[int, ...]
    below: tuple[tuple[int, ...], ...]

    def offsets(self, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return offsets as longest paths, for sizes of shape (buffers,) or (buffers, shapes)."""
        offsets = np.zeros_like(sizes)
        for index in self.order:
            under = list(self.below[index])
            if under:
                offsets[index] = (offsets[under] + sizes[under]).max(axis=0)
        return offsets


def overlap_matrix(lifetimes: Sequence[Lifetime]) -> npt.NDArray[np.bool_]:
    """Return (n, n) bool: which buffers are alive in a common launch; False on the diagonal."""
    begin = np.array([x.begin for x in lifetimes], dtype=np.int64)
    end = np.array([x.end for x in lifetimes], dtype=np.int64)
    both = (begin[:, None] < end[None, :]) & (begin[None, :] < end[:, None])
    np.fill_diagonal(both, False)
    return both


def orient(lifetimes: Sequence[Lifetime], offsets: Sequence[int]) -> Orientation:
    """Return the orientation of a placement.

    Every pair alive together is oriented by (offset, index), a total order, so the relation has no
    cycle. Pairs implied transitively are dropped.
    """
    count = len(lifetimes)
    order = sorted(range(count), key=lambda i: (offsets[i], i))
    rank = np.empty(count, dtype=np.int64)
    rank[order] = np.arange(count)
    below = overlap_matrix(lifetimes) & (rank[:, None] < rank[None, :])
    implied = (below.astype(np.float32) @ below.astype(np.float32)) > 0
    direct = below & ~implied
    return Orientation(
        tuple(order), tuple(tuple(np.flatnonzero(direct[:, i]).tolist()) for i in range(count))
    )


def prune(rows: Forms) -> Forms:
    """Return the rows that can be the largest for some sizes >= 0: those not <= another
    everywhere."""
    rows = np.unique(rows, axis=0)
    if len(rows) < 2:
        return rows
    covered: npt.NDArray[np.bool_] = np.all(rows[:, None, :] <= rows[None, :, :], axis=2)
    np.fill_diagonal(covered, False)
    return np.ascontiguousarray(rows[~np.any(covered, axis=1)])


class FormTable:
    """Offsets as pruned forms; equal sets, as in repeated layers, are stored once.

    `sets[s]` are the distinct form sets, `of_buffer[i]` is the set of buffer i, and `top` are the
    footprint's forms. `complete` is False if some buffer needs more than MAX_FORMS.
    """

    def __init__(
        self, orientation: Orientation, size_class: Sequence[int], class_count: int
    ) -> None:
        self.sets: list[Forms] = []
        self.of_buffer = [0] * len(orientation.order)
        self.complete = True
        self.top: Forms = np.zeros((1, class_count), dtype=np.int64)
        self._ids: dict[bytes, int] = {}
        self._class_count = class_count
        self._unions: dict[frozenset[tuple[int, int]], int] = {}
        for index in orientation.order:
            under = orientation.below[index]
            parts = frozenset((self.of_buffer[j], size_class[j]) for j in under)
            self.of_buffer[index] = self._stack(parts)
            if not self.complete:
                return
        self.top = self._raise(frozenset(zip(self.of_buffer, size_class, strict=True)))

    def _stack(self, parts: frozenset[tuple[int, int]]) -> int:
        """Return the id of the form set of a buffer that lies on top of these (form set, class)
        pairs."""
        known = self._unions.get(parts)
        if known is not None:
            return known
        forms = self._raise(parts)
        if len(forms) > MAX_FORMS:
            self.complete = False
        key = forms.tobytes()
        if key not in self._ids:
            self._ids[key] = len(self.sets)
            self.sets.append(forms)
        self._unions[parts] = self._ids[key]
        return self._ids[key]

    def _raise(self, parts: frozenset[tuple[int, int]]) -> Forms:
        """Return the forms of the tops of these: each one's forms plus one of its own class."""
        rows = [np.zeros((1, self._class_count), dtype=np.int64)]
        for set_id, klass in sorted(parts):
            raised = self.sets[set_id].copy()
            raised[:, klass] += 1
            rows.append(raised)
        return prune(np.concatenate(rows))


def live_forms(lifetimes: Sequence[Lifetime], size_class: Sequence[int], class_count: int) -> Forms:
    """Return the lower bound as pruned forms: the number of live buffers of each class, per
    launch."""
    rows = np.zeros((1, class_count), dtype=np.int64)
    if lifetimes:
        delta = np.zeros((max(x.end for x in lifetimes) + 1, class_count), dtype=np.int64)
        for lifetime, klass in zip(lifetimes, size_class, strict=True):
            delta[lifetime.begin, klass] += 1
            delta[lifetime.end, klass] -= 1
        rows = np.concatenate([rows, np.cumsum(delta, axis=0)])
    return prune(rows)
