"""Reading: prompts that are read together, each after the blocks that are known of its beginning.

In: sequences, the rows that decode, the tree of known prefixes. Out: which columns of a cache hold
what, and how many blocks that takes. No tensors in here, so that simulations use it too::

    lay_out([sequence], slots, tree, piece=256, most_columns=4096)
        ->  PromptReading(rows=[...], first=128, pad=37, length=20)

Columns of a reading: `first` in whole blocks, which are known and shared; `pad` empty ones, so that
it ends where the batch does; `length` that are read, shorter prompts filled up on the left.
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
    """What is known here of a sequence."""

    def __hash__(self) -> int:
        """Two are equal only if they are one."""

    @property
    def prompt(self) -> Sequence[int]:
        """The tokens to be read before the next one is made: after it gave way, also its own."""

    @property
    def most(self) -> int:
        """Positions that it takes at its end."""


@dataclass
class PromptRow:
    """A prompt, those who go on from it, and the last block that is known of it."""

    prompt: tuple[int, ...]
    keys: list[Hashable]
    prefix: PrefixBlock

    def __post_init__(self) -> None:
        self.chain = self.prefix.chain()
        self.cached = sum(len(block.tokens) for block in self.chain)
        """Tokens that need not be read."""


@dataclass
class PromptReading:
    """Prompts that are read together, equal ones once.

    cache: what holds the columns. done: of `length`, how many are in it; next: after the next call.
    fits: whether all rows stay within the columns that the model takes.
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
        """Those who wait for it."""
        return [key for row in self.rows for key in row.keys]

    @property
    def start(self) -> int:
        """Columns before those that are read."""
        return self.first + self.pad

    @property
    def end(self) -> int:
        """All columns."""
        return self.start + self.length

    @property
    def blocks(self) -> int:
        """Blocks of every layer that it takes at its end, beside those that others hold."""
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
        """Return which columns a row has tokens in, (columns,)."""
        parts, gap = [block.mask for block in row.chain], self.gap_of(row)
        before = np.zeros(self.first - BLOCK * len(parts), np.bool_)
        left = np.ones(self.end - self.first - gap, np.bool_)
        return np.concatenate([before, *parts, np.zeros(gap, np.bool_), left])

    def table(self, layers: int) -> NDArray[np.int64]:
        """Return the known blocks, (layers, rows, columns of blocks), -1 for none."""
        made = np.full((layers, len(self.rows), self.first // BLOCK), -1, np.int64)
        for place, row in enumerate(self.rows):
            for column, block in enumerate(row.chain, made.shape[2] - len(row.chain)):
                made[:, place, column] = block.ids
        return made


def lay_out(
    sequences: Sequence[Prompted], slots: Slots, tree: PrefixTree, piece: int, most_columns: int
) -> PromptReading:
    """Return how prompts are read together, before the rows of `slots` and by `piece` columns.

    most_columns: that a row may have at its end; a prefix whose empty columns pass it is not used.
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
