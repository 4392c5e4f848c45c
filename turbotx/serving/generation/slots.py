"""Slots: the rows of the batch's cache, and the columns of their positions.

In: sequences that join and leave. Out: their order, the batch's columns, and the blocks they use.
There are no tensors here, so that simulations can use it::

    slots = Slots(); slots.join([Entry("a", 5)], end=9)   # 9 columns, the first 4 of them empty

All rows end at the same column: a row of 5 positions in a batch of 9 columns starts at column 4,
and the attention mask hides the columns before. Distances between columns equal those between
positions, as sliding windows and distance biases require. Columns form blocks of 64; a row moves by
whole blocks only, which changes block tables and copies no keys or values.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

BLOCK = 64
"""Columns of a block."""


@dataclass
class Entry:
    """A sequence and its number of positions in the cache."""

    key: Hashable
    count: int


@dataclass
class Slots:
    """The rows of a batch and its number of columns."""

    rows: list[Entry] = field(default_factory=list)
    length: int = 0
    most: int | None = None
    """Columns that the model takes, empty ones included; None for any number."""

    @property
    def blocks(self) -> int:
        """Blocks per layer of all rows, if none are shared."""
        return sum(-(-self.length // BLOCK) - (self.length - e.count) // BLOCK for e in self.rows)

    def pad(self, length: int, piece: int) -> int:
        """Return the empty columns before a prefill of `length` columns, read by `piece` with a
        decoding step in between, so that it ends at the batch's column modulo whole blocks."""
        steps = -(-length // piece) - 1
        return (self.length + steps - length) % BLOCK if self.rows else 0

    def join(self, new: Sequence[Entry], end: int) -> None:
        """Add rows that end at column `end` of other caches.

        Raises ValueError if that is another column modulo the block size than the batch's.
        """
        if self.rows and (self.length - end) % BLOCK:
            raise ValueError(f"rows that end at column {end} cannot join a batch of {self.length}")
        self.length = self.length if self.rows else end
        self.rows += new
        self._fit()

    def leave(self, key: Hashable) -> None:
        """Remove a sequence's row, if it has one."""
        self.rows = [e for e in self.rows if e.key != key]
        self._fit()

    def advance(self) -> None:
        """Record that a step wrote one position of every row."""
        self.length += 1
        for entry in self.rows:
            entry.count += 1

    def _fit(self) -> None:
        """Shift all rows by whole blocks, to the fewest columns that hold the longest row."""
        longest = max((e.count for e in self.rows), default=0)
        self.length = (self.length - longest) % BLOCK + longest if self.rows else 0
