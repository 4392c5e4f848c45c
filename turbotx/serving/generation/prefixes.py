"""Prefix tree: blocks of keys and values that are found again by the tokens they belong to.

In: the blocks of texts that are made or were made, with their tokens. Out: the blocks of the
longest known beginning of a new prompt; those that no text uses any more are evicted, the least
recently used first::

    tree.add(tree.root, tokens, mask, table)
    tree.find(prompt, most_gaps=64).chain()     ->  [PrefixBlock, ...]

vLLM's automatic prefix caching chains hashes of blocks, SGLang keeps a tree of tokens; this is a
tree whose edges are a block's tokens, so that no two prefixes are ever taken for each other. A
block holds up to 64 positions: its mask says in which columns, since a row may begin, or go on, in
the middle of a block. Positions are counted without empty columns, so that keys and values depend
on the tokens alone. No tensors in here, so that simulations use it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from turbotx.serving.generation.slots import BLOCK

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]

GAPS = 8
"""A prefix has one block of empty columns at the most, and one for every so many blocks."""


class SharedBlocks(Protocol):
    """Blocks that count who refers to them."""

    def share(self, ids: Ids) -> None:
        """Add a reference to each."""

    def release(self, ids: Ids) -> None:
        """Drop a reference to each."""


@dataclass(eq=False)
class PrefixBlock:
    """A block of every layer, after those of its parents.

    tokens: of its positions. mask: (64,), True in the columns where they are. ids: of the block in
    each layer, (layers,). holders: texts that use it or a block below it.
    """

    parent: PrefixBlock | None = None
    tokens: tuple[int, ...] = ()
    mask: Mask = field(default_factory=lambda: np.zeros(BLOCK, np.bool_))
    ids: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    children: dict[int, dict[tuple[int, ...], PrefixBlock]] = field(default_factory=dict)
    """By how many tokens they have, and by these."""
    holders: int = 0

    def chain(self) -> list[PrefixBlock]:
        """Return the blocks from the first one to this; none for the root."""
        found, block = list[PrefixBlock](), self
        while block.parent is not None:
            found.append(block)
            block = block.parent
        return found[::-1]


class PrefixTree:
    """Owned by one thread."""

    def __init__(self, blocks: SharedBlocks | None = None, gaps: bool = True) -> None:
        """blocks: of all caches; None: nothing is kept. gaps: whether a row may have empty columns
        between its tokens; not where the model counts them."""
        self.root, self.evicted, self.gaps = PrefixBlock(), 0, gaps
        self._blocks = blocks
        self._idle: dict[PrefixBlock, None] = {}
        """Blocks without holders, the least recently used first, and each before its parent."""

    @property
    def enabled(self) -> bool:
        """Whether blocks are kept."""
        return self._blocks is not None

    @property
    def idle(self) -> int:
        """Blocks of every layer that no text uses: those that can be evicted."""
        return len(self._idle)

    def find(self, tokens: Sequence[int], most_gaps: int) -> PrefixBlock:
        """Return the last block of the longest known beginning, the root where there is none; it
        leaves one token or more to be read.

        most_gaps: empty columns that its blocks may have.
        """
        best, found, paths = self.root, 0, [(self.root, 0, 0)]
        while paths:
            block, at, blocks = paths.pop()
            gaps = (blocks + 1) * BLOCK - at
            for count, children in block.children.items():
                if at + count >= len(tokens) or (
                    gaps - count > min(most_gaps, BLOCK + (blocks + 1) * BLOCK // GAPS)
                ):
                    continue
                child = children.get(tuple(tokens[at : at + count]))
                if child is not None:
                    paths.append((child, at + count, blocks + 1))
            if at > found:
                best, found = block, at
        return best

    def hold(self, block: PrefixBlock) -> None:
        """Keep a block, and those before it, while a text uses them."""
        for each in block.chain():
            if not each.holders:
                del self._idle[each]
            each.holders += 1

    def let_go(self, block: PrefixBlock) -> None:
        """End a `hold`: blocks that nobody holds are the most recently used ones from now on."""
        for each in reversed(block.chain()):
            each.holders -= 1
            if not each.holders:
                self._idle[each] = None

    def add(self, held: PrefixBlock, tokens: Sequence[int], mask: Mask, table: Ids) -> PrefixBlock:
        """Note the full blocks of a row, and hold the last one instead of `held`; return it.

        mask: (columns,), True where the row's tokens are, from the beginning of a block on. table:
        the row's blocks, (layers, blocks or more). A block of known tokens is not noted again.
        """
        if self._blocks is None:
            return held
        block, at, made = self.root, 0, list[PrefixBlock]()
        for column in range(len(mask) // BLOCK):
            part = mask[column * BLOCK : (column + 1) * BLOCK]
            own = tuple(tokens[at : at + int(part.sum())])
            if not own:
                continue
            at += len(own)
            siblings = block.children.setdefault(len(own), {})
            known = siblings.get(own)
            if known is None:
                ids = table[:, column].copy()
                known = siblings[own] = PrefixBlock(block, own, part.copy(), ids)
                self._blocks.share(ids)
                made.append(known)
            block = known
        self._idle |= dict.fromkeys(reversed(made))
        self.hold(block)
        self.let_go(held)
        return block

    def evict(self, count: int) -> None:
        """Let go of so many blocks of every layer, or of all that are idle."""
        for block in list(islice(self._idle, count)):
            assert self._blocks is not None and block.parent is not None and not block.children
            siblings = block.parent.children[len(block.tokens)]
            del self._idle[block], siblings[block.tokens]
            if not siblings:
                del block.parent.children[len(block.tokens)]
            self._blocks.release(block.ids)
            self.evicted += 1
