"""Prefix tree: finds cached blocks of keys and values by their tokens.

In: blocks of earlier and running texts, with their tokens. Out: the blocks of the longest cached
prefix of a new prompt. Blocks that no text uses are evicted, least recently used first::

    tree.add(tree.root, tokens, mask, table)
    tree.find(prompt, most_gaps=64).chain()     ->  [PrefixBlock, ...]

vLLM's automatic prefix caching chains hashes of blocks, SGLang keeps a tree of tokens; this tree's
edges are a block's tokens, so that different prefixes can never collide. A block holds up to 64
positions: its mask gives their columns, since a row may start or continue inside a block. Positions
do not count empty columns, so that keys and values depend on the tokens alone. There are no tensors
here, so that simulations can use it.
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
    """Reference-counted blocks."""

    def share(self, ids: Ids) -> None:
        """Add a reference to each block."""

    def release(self, ids: Ids) -> None:
        """Remove a reference from each block."""


@dataclass(eq=False)
class PrefixBlock:
    """One block per layer, following those of its parents.

    tokens: of its positions. mask: (64,) bool, True in the columns of tokens. ids: the block's id
    in each layer, (layers,). holders: number of texts that use it or a block below it.
    """

    parent: PrefixBlock | None = None
    tokens: tuple[int, ...] = ()
    mask: Mask = field(default_factory=lambda: np.zeros(BLOCK, np.bool_))
    ids: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    children: dict[int, dict[tuple[int, ...], PrefixBlock]] = field(default_factory=dict)
    """By how many tokens they have, and by these."""
    holders: int = 0

    def chain(self) -> list[PrefixBlock]:
        """Return the blocks from the first one to this; empty for the root."""
        found, block = list[PrefixBlock](), self
        while block.parent is not None:
            found.append(block)
            block = block.parent
        return found[::-1]


class PrefixTree:
    """The tree of cached prefixes; used by one thread."""

    def __init__(self, blocks: SharedBlocks | None = None, gaps: bool = True) -> None:
        """blocks: of all caches; None: nothing is cached. gaps: whether a row may have empty
        columns between its tokens; not if the model counts them."""
        self.root, self.evicted, self.gaps = PrefixBlock(), 0, gaps
        self._blocks = blocks
        self._idle: dict[PrefixBlock, None] = {}
        """Blocks without holders, the least recently used first, and each before its parent."""

    @property
    def enabled(self) -> bool:
        """Whether prefixes are cached."""
        return self._blocks is not None

    @property
    def idle(self) -> int:
        """Blocks per layer that no text uses and that can be evicted."""
        return len(self._idle)

    def find(self, tokens: Sequence[int], most_gaps: int) -> PrefixBlock:
        """Return the last block of the longest cached prefix, the root if there is none.

        At least one token is left to be read. most_gaps: most empty columns of its blocks.
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
        """Protect a block and its parents from eviction while a text uses them."""
        for each in block.chain():
            if not each.holders:
                del self._idle[each]
            each.holders += 1

    def let_go(self, block: PrefixBlock) -> None:
        """End a `hold`; blocks without holders become the most recently used idle ones."""
        for each in reversed(block.chain()):
            each.holders -= 1
            if not each.holders:
                self._idle[each] = None

    def add(self, held: PrefixBlock, tokens: Sequence[int], mask: Mask, table: Ids) -> PrefixBlock:
        """Add a row's full blocks; hold the last one instead of `held` and return it.

        mask: (columns,) bool, True where the row has tokens, starting at a block. table: the row's
        block ids, (layers, at least that many blocks). Blocks of cached tokens are not added again.
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
        """Evict `count` blocks per layer, or all idle ones."""
        for block in list(islice(self._idle, count)):
            assert self._blocks is not None and block.parent is not None and not block.children
            siblings = block.parent.children[len(block.tokens)]
            del self._idle[block], siblings[block.tokens]
            if not siblings:
                del block.parent.children[len(block.tokens)]
            self._blocks.release(block.ids)
            self.evicted += 1
