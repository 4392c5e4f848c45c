"""Slots: which sequence has which row of the batch's cache, and how its positions lie.

In: sequences that join and leave. Out: what has to be done to the memory: nothing, rows written
into free slots, or all rows written anew. No tensors in here, so that simulations use it too::

    slots = Slots(); slots.join([Entry("a", 5)])  ->  Rebuild([Entry("a", 5)], [None], length=5)

All rows end at the same column: a row of 5 positions in a batch of 9 columns begins at column 4,
and the attention mask hides what is before. Distances between columns are those between positions,
as windows and biases by distance need it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

BLOCK = 64
"""Columns that memory is counted in."""


@dataclass
class Entry:
    """A sequence and how many positions of it are in the cache."""

    key: Hashable
    count: int


@dataclass(frozen=True)
class Rebuild:
    """New memory of one row an entry, in this order, and `length` columns; rows: which each had
    in the memory before, None for new ones."""

    entries: Sequence[Entry]
    rows: Sequence[int | None]
    length: int


@dataclass(frozen=True)
class Place:
    """One new entry goes into the row of one that has left."""

    row: int
    entry: Entry


@dataclass
class Slots:
    """The rows of a batch; None is free."""

    rows: list[Entry | None] = field(default_factory=list)
    length: int = 0

    @property
    def live(self) -> list[Entry]:
        """The entries that have a row."""
        return [e for e in self.rows if e is not None]

    @property
    def held(self) -> int:
        """Positions of memory that the rows take, whole blocks of columns."""
        return held_positions(len(self.rows), self.length)

    def join(self, new: Sequence[Entry]) -> Rebuild | list[Place]:
        """Give every new entry a row; return what has to be written."""
        free = [i for i, e in enumerate(self.rows) if e is None]
        longest = max(e.count for e in new)
        if len(new) <= len(free) and longest <= self.length:
            places = [Place(row, entry) for row, entry in zip(free, new, strict=False)]
            for place in places:
                self.rows[place.row] = place.entry
            return places
        return self._rebuild(new)

    def leave(self, key: Hashable) -> None:
        """Free a sequence's row, if it has one; the memory stays until `tidy`."""
        self.rows = [None if e is not None and e.key == key else e for e in self.rows]

    def tidy(self, force: bool = False) -> Rebuild | None:
        """Return how to write the rows anew where too much of them is unused, else None.

        More than a quarter of the rows are free, or half of the columns are before the first
        position of all. force: where any of either is.
        """
        live = self.live
        free, longest = len(self.rows) - len(live), max((e.count for e in live), default=0)
        shorter = held_positions(1, longest) < held_positions(1, self.length)
        if not live:
            self.rows, self.length = [], 0
            return None
        if 4 * free > len(self.rows) or (2 * longest <= self.length and shorter):
            return self._rebuild([])
        return self._rebuild([]) if force and (free or shorter) else None

    def advance(self) -> None:
        """Note that a step has written one position of every row."""
        self.length += 1
        for entry in self.live:
            entry.count += 1

    def _rebuild(self, new: Sequence[Entry]) -> Rebuild:
        before = {id(e): row for row, e in enumerate(self.rows) if e is not None}
        entries = [*self.live, *new]
        self.rows, self.length = list(entries), max(e.count for e in entries)
        return Rebuild(entries, [before.get(id(e)) for e in entries], self.length)


def held_positions(rows: int, length: int) -> int:
    """Return the positions of memory that so many rows of so many columns take."""
    return rows * -(-length // BLOCK) * BLOCK
