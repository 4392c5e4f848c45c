"""Slots: which sequences are the rows of the batch's cache, and how their positions lie.

In: sequences that join and leave. Out: their order, the columns of the batch, the blocks that these
take. No tensors in here, so that simulations use it too::

    slots = Slots(); slots.join([Entry("a", 5)], end=9)   # 9 columns, the first 4 of them empty

All rows end at the same column: a row of 5 positions in a batch of 9 columns begins at column 4,
and the attention mask hides what is before. Distances between columns are those between positions,
as windows and biases by distance need it. Columns lie in blocks of 64, so that a row moves by whole
blocks alone: by cells of a table, and not by its keys and values.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

BLOCK = 64
"""Columns of a block."""


@dataclass
class Entry:
    """A sequence and how many positions of it are in the cache."""

    key: Hashable
    count: int


@dataclass
class Slots:
    """The rows of a batch, in order, and its columns."""

    rows: list[Entry] = field(default_factory=list)
    length: int = 0
    most: int | None = None
    """Columns that the model takes, empty ones included; None for any number."""

    @property
    def blocks(self) -> int:
        """Blocks of every layer that the rows take, where none shares any."""
        return sum(-(-self.length // BLOCK) - (self.length - e.count) // BLOCK for e in self.rows)

    def pad(self, length: int, piece: int) -> int:
        """Return how many columns to leave empty before `length` others that are read by `piece`,
        with a step between two pieces, so that they end where the batch does then, whole blocks
        aside."""
        steps = -(-length // piece) - 1
        return (self.length + steps - length) % BLOCK if self.rows else 0

    def join(self, new: Sequence[Entry], end: int) -> None:
        """Add rows that end at column `end` of other caches.

        Raises ValueError where that is at another place of a block than the batch's end.
        """
        if self.rows and (self.length - end) % BLOCK:
            raise ValueError(f"rows that end at column {end} join a batch of {self.length}")
        self.length = self.length if self.rows else end
        self.rows += new
        self._fit()

    def leave(self, key: Hashable) -> None:
        """Take a sequence's row away, if it has one."""
        self.rows = [e for e in self.rows if e.key != key]
        self._fit()

    def advance(self) -> None:
        """Note that a step has written one position of every row."""
        self.length += 1
        for entry in self.rows:
            entry.count += 1

    def _fit(self) -> None:
        """Move all rows by whole blocks, to as few columns as the longest one needs."""
        longest = max((e.count for e in self.rows), default=0)
        self.length = (self.length - longest) % BLOCK + longest if self.rows else 0
