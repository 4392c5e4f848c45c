"""Which blocks are found again, and which go first."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.serving.generation.simulation import CountedBlocks
from turbotx.serving.generation.prefixes import PrefixTree
from turbotx.serving.generation.slots import BLOCK

FULL = np.ones(BLOCK, np.bool_)
A, B, C = list(range(BLOCK)), list(range(100, 100 + BLOCK)), list(range(200, 200 + BLOCK))


class Kept:
    """A tree, and blocks of two layers whose ids are new ones each time."""

    def __init__(self):
        self.blocks, self.made = CountedBlocks(), 0
        self.tree = PrefixTree(self.blocks)

    def add(self, tokens, mask=None, held=None):
        mask = np.ones(len(tokens) // BLOCK * BLOCK, np.bool_) if mask is None else mask
        count = -(-len(mask) // BLOCK)
        table = self.made + np.arange(2 * count).reshape(2, count)
        self.made += 2 * count
        return self.tree.add(held or self.tree.root, tokens, mask, table)

    def keep(self, *arguments):
        self.tree.let_go(self.add(*arguments))

    def found(self, tokens, most_gaps=1 << 20):
        chain = self.tree.find(tokens, most_gaps).chain()
        return sum(len(block.tokens) for block in chain)

    @property
    def references(self):
        return +self.blocks.references


def test_full_blocks_are_found_and_a_token_is_left_to_read():
    kept = Kept()
    kept.keep([*A, *B, 7])
    assert kept.found([*A, *B, 9]) == 2 * BLOCK
    assert kept.found([*A, *B]) == kept.found([*A, 9, *B]) == BLOCK
    assert kept.found(A) == kept.found([*B, *A]) == 0
    assert kept.tree.idle == 2 and len(kept.references) == 4


def test_blocks_of_other_columns_are_found_and_the_longest_beginning_counts():
    kept = Kept()
    late = np.concatenate([np.zeros(40, np.bool_), np.ones(2 * BLOCK - 40, np.bool_)])
    kept.keep(A, FULL)
    kept.keep([*A, *B], late)  # 24 tokens in its first block
    assert kept.found([*A, *B]) == 88
    assert kept.found([*A, *B], most_gaps=39) == BLOCK, "too many empty columns"
    chain = kept.tree.find([*A, *B], 64).chain()
    assert [int(block.mask.sum()) for block in chain] == [24, 64]


def test_prefixes_of_mostly_empty_blocks_are_not_used():
    kept, sparse = Kept(), np.arange(20 * BLOCK) % BLOCK >= 32
    kept.keep(list(range(640)), sparse)
    assert kept.found(list(range(700))) == 32 * 2, "a block and an eighth of empty columns"


def test_known_tokens_keep_their_block():
    kept = Kept()
    first, again = kept.add(A), kept.add(A)
    assert first is again and first.holders == 2 and len(kept.references) == 2
    kept.tree.let_go(first)
    assert kept.tree.idle == 0
    kept.tree.let_go(again)
    assert kept.tree.idle == 1


def test_the_least_recently_used_go_first_and_no_block_before_those_after_it():
    kept = Kept()
    kept.keep([*A, *B])
    kept.keep([*A, *C])
    kept.keep(C)
    kept.tree.hold(block := kept.tree.find([*A, *B, 1], 64))
    kept.tree.let_go(block)  # used again
    kept.tree.evict(2)
    assert kept.found([*A, *C, 1]) == BLOCK and kept.found([*C, 1]) == 0
    assert kept.found([*A, *B, 1]) == 2 * BLOCK
    kept.tree.evict(1)
    assert kept.found([*A, *B, 1]) == BLOCK


def test_what_is_held_is_never_evicted():
    kept = Kept()
    held = kept.add([*A, *B])
    kept.keep(C)
    kept.tree.evict(9)
    assert kept.tree.evicted == 1 and kept.found([*A, *B, 1]) == 2 * BLOCK
    kept.tree.let_go(held)
    kept.tree.evict(9)
    assert not kept.references and kept.tree.idle == 0 and not kept.tree.root.children


def test_a_tree_without_blocks_keeps_nothing():
    tree = PrefixTree()
    assert tree.add(tree.root, A, FULL, np.zeros((1, 1), np.int64)) is tree.root
    assert tree.find([*A, 1], 64) is tree.root and tree.idle == 0


texts = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), min_size=1, max_size=5)


@given(st.lists(st.tuples(texts, st.booleans(), st.integers(0, 3)), max_size=30))
def test_references_and_holders_add_up(moves):
    """Texts of a few blocks, any columns of which are empty, held or let go, some evicted."""
    kept, held = Kept(), []
    for blocks, stays, evicted in moves:
        mask = np.concatenate([np.arange(BLOCK) >= gap for _, gap in blocks])
        tokens = [t for kind, gap in blocks for t in [kind] * (BLOCK - gap)]
        block = kept.add(tokens, mask)
        found = kept.tree.find([*tokens, 9], 1 << 20).chain()
        assert [t for each in found for t in each.tokens] == tokens[: kept.found([*tokens, 9])]
        if stays:
            held.append(block)
        else:
            kept.tree.let_go(block)
        kept.tree.evict(evicted)
        inner = {each for block in held for each in block.chain()}
        assert len(kept.references) == 2 * (len(inner) + kept.tree.idle)
        assert set(kept.references.values()) <= {1}
    for block in held:
        kept.tree.let_go(block)
    kept.tree.evict(kept.tree.idle)
    assert not kept.references and not kept.tree.root.children
