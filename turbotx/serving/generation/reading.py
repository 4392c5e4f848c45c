"""Reading: the layout of prompts that are prefilled together, each after its cached prefix.

In: sequences, the decoding rows, the prefix tree. Out: the contents of the cache's columns, and the
number of blocks they take. There are no tensors here, so that simulations can use it::

    lay_out([sequence], slots, tree, piece=256, most_columns=4096)
        ->  PromptReading(rows=[...], first=128, pad=37, length=20)

Columns of a reading: `first` in whole blocks, cached and shared; `pad` empty ones, so that it ends
at the batch's column; `length` that are read, with shorter prompts padded on the left.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from turbotx.serving.generation.prefixes import Mask, PrefixBlock, PrefixTree
from turbotx.serving.generation.slots import BLOCK, Slots


class Prompted(Protocol):
    """The part of a sequence that a layout needs."""

    def __hash__(self) -> int:
        """Return a hash by identity: equal only to itself."""

    @property
    def prompt(self) -> Sequence[int]:
        """The tokens to prefill; after a preemption also the generated ones."""

    @property
    def most(self) -> int:
        """Most positions it can have."""


@dataclass
class PromptRow:
    """A prompt, the sequences that continue it, and the last block of its cached prefix."""

    prompt: tuple[int, ...]
    keys: list[Hashable]
    prefix: PrefixBlock

    def __post_init__(self) -> None:
        self.chain = self.prefix.chain()
        self.cached = sum(len(block.tokens) for block in self.chain)
        """Tokens that need not be read."""


@dataclass
class PromptReading:
    """Prompts that are prefilled together, equal prompts once.

    cache: holds the columns. done: columns of `length` already read; next: `done` after the next
    call. fits: whether all rows stay within the columns that the model takes.
    """

    rows: list[PromptRow]
    first: int
    pad: int
    length: int
    next: int
    done: int = 0
    cache: Any = None
    fits: bool = True

    @property
    def keys(self) -> list[Hashable]:
        """The sequences that wait for it."""
        return [key for row in self.rows for key in row.keys]

    @property
    def start(self) -> int:
        """Number of columns before those that are read."""
        return self.first + self.pad

    @property
    def end(self) -> int:
        """Number of all columns."""
        return self.start + self.length

    @property
    def blocks(self) -> int:
        """Blocks per layer that it allocates, without shared ones."""
        revived = {block for row in self.rows for block in row.chain if not block.holders}
        return len(revived) + len(self.rows) * -(-(self.pad + self.length) // BLOCK)

    def gap_of(self, row: PromptRow) -> int:
        """Return how many columns are empty between a row's known blocks and what is read."""
        return self.pad + self.length - (len(row.prompt) - row.cached)

    def columns_of(self, row: PromptRow, most: int) -> int:
        """Return how many columns a row takes when it has `most` positions, empty ones between them
        and before them in its first block included."""
        mask = self.mask_of(row)
        begin = int(mask.argmax())
        return begin % BLOCK + len(mask) - begin - len(row.prompt) + most

    def mask_of(self, row: PromptRow) -> Mask:
        """Return a row's mask, (columns,) bool, True where it has tokens."""
        parts, gap = [block.mask for block in row.chain], self.gap_of(row)
        before = np.zeros(self.first - BLOCK * len(parts), np.bool_)
        left = np.ones(self.end - self.first - gap, np.bool_)
        return np.concatenate([before, *parts, np.zeros(gap, np.bool_), left])

    def table(self, layers: int) -> NDArray[np.int64]:
        """Return the block ids of the cached prefixes, int64 (layers, rows, blocks), -1 for
        none."""
        made = np.full((layers, len(self.rows), self.first // BLOCK), -1, np.int64)
        for place, row in enumerate(self.rows):
            for column, block in enumerate(row.chain, made.shape[2] - len(row.chain)):
                made[:, place, column] = block.ids
        return made


def lay_out(
    sequences: Sequence[Prompted], slots: Slots, tree: PrefixTree, piece: int, most_columns: int
) -> PromptReading:
    """Return the layout of a joint prefill, by `piece` columns, that joins the rows of `slots`.

    most_columns: limit of a row's columns; a prefix with too many empty columns is not used.
    """
    keys: dict[tuple[int, ...], list[Prompted]] = {}
    for sequence in sequences:
        keys.setdefault(tuple(sequence.prompt), []).append(sequence)
    most = [max(s.most for s in those) for those in keys.values()]
    known = [tree.find(p, most_columns - m) for p, m in zip(keys, most, strict=True)]
    for prefixes in known, [tree.root] * len(known):
        rows = [PromptRow(p, list(keys[p]), k) for p, k in zip(keys, prefixes, strict=True)]
        length = max(len(row.prompt) - row.cached for row in rows)
        first = BLOCK * max(len(row.chain) for row in rows)
        made = PromptReading(rows, first, slots.pad(length, piece), length, min(length, piece))
        if slots.most is not None:
            columns = [made.columns_of(row, m) for row, m in zip(rows, most, strict=True)]
            made.fits = max(columns) <= slots.most
        if made.fits and (tree.gaps or not any(r.chain and made.gap_of(r) for r in rows)):
            break
    return made
