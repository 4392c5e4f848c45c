"""Cache blocks: counted by who refers to them, free again at the last one's release."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from turbotx.errors import VerifyError
from turbotx.memory.cache_blocks import CacheBlocks, can_have_blocks
from turbotx.memory.cache_blocks_check import check_blocks


def make(nbytes=1000, most=None):
    counted = [0]

    def count(more):
        if most is not None and counted[0] + more > most:
            raise MemoryError("full")
        counted[0] += more

    return CacheBlocks(nbytes, count), counted


def test_a_block_is_free_when_nobody_refers_to_it() -> None:
    blocks, counted = make()
    ids = blocks.take(3)
    assert ids.tolist() == [0, 1, 2] and counted == [3000]
    blocks.share(ids[[0, 0]])
    blocks.release(ids)
    assert blocks.used == 1 and counted == [1000]
    assert blocks.take(2).tolist() == [1, 2]
    blocks.release(np.array([0, 0, 1, 2]))
    assert blocks.used == counted[0] == 0


def test_memory_stays_where_it_is_and_is_given_back() -> None:
    blocks, _ = make(1 << 20)
    ids = blocks.take(2)
    blocks.memory[: 2 << 20] = 7
    more = blocks.take(20)
    assert (blocks.memory[: 2 << 20] == 7).all() and blocks.mapped_nbytes == 22 << 20
    blocks.release(more)
    assert blocks.mapped_nbytes == 2 << 20
    blocks.release(ids)
    assert blocks.mapped_nbytes == 0


def test_what_is_refused_takes_nothing() -> None:
    blocks, counted = make(most=2500)
    ids = blocks.take(2)
    with pytest.raises(MemoryError):
        blocks.take(1)
    assert blocks.used == 2 and counted == [2000]
    check_blocks(blocks, [ids])


def test_a_release_in_the_midst_of_a_change_is_done_after_it() -> None:
    seen = []

    def count(nbytes):
        if nbytes > 0 and seen:  # as a finalizer that runs while blocks are taken
            blocks.release(seen.pop())
            assert blocks.used == 2

    blocks = CacheBlocks(1000, count)
    seen.append(blocks.take(2))
    assert blocks.take(1).tolist() == [2] and blocks.used == 1


def test_the_checker_sees_references_that_nobody_holds_and_blocks_that_nobody_counts() -> None:
    blocks, _ = make()
    ids = blocks.take(3)
    check_blocks(blocks, [ids[:2].reshape(1, 2), np.array([2, -1])])
    for tables in ([ids[:2]], [ids, ids[:1]], [ids, np.array([9])]):
        with pytest.raises(VerifyError, match="references, and"):
            check_blocks(blocks, tables)


def test_blocks_are_for_cpus() -> None:
    assert can_have_blocks(torch.device("cpu")) and not can_have_blocks(torch.device("cuda"))
