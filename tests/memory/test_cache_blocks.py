"""Cache blocks: counted by who refers to them, free again at the last one's release."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.memory.cache_blocks_check import check_blocks
from turbotx.errors import VerifyError
from turbotx.memory import cache_blocks
from turbotx.memory.arena import PlainRange
from turbotx.memory.cache_blocks import CacheBlocks, can_have_blocks
from turbotx.memory.cpu_range import CpuRange
from turbotx.memory.planner.plan import CHUNK_NBYTES


def make(nbytes=1000, most=None):
    counted = [0]

    def count(more):
        if most is not None and counted[0] + more > most:
            raise MemoryError("full")
        counted[0] += more

    return CacheBlocks(nbytes, count, torch.device("cpu")), counted


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


def test_a_debugger_may_show_memory_that_nobody_has_taken() -> None:
    blocks = CacheBlocks(4096, lambda nbytes: None, torch.device("cpu"))
    assert repr(blocks.memory).startswith("tensor([0, 0, 0,  ..., 0, 0, 0]")


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

    blocks = CacheBlocks(1000, count, torch.device("cpu"))
    seen.append(blocks.take(2))
    assert blocks.take(1).tolist() == [2] and blocks.used == 1


def test_the_checker_sees_references_that_nobody_holds_and_blocks_that_nobody_counts() -> None:
    blocks, _ = make()
    ids = blocks.take(3)
    check_blocks(blocks, [ids[:2].reshape(1, 2), np.array([2, -1])])
    for tables in ([ids[:2]], [ids, ids[:1]], [ids, np.array([9])]):
        with pytest.raises(VerifyError, match="references, and"):
            check_blocks(blocks, tables)


def test_blocks_need_addresses_that_do_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def open_plain(device: torch.device, nbytes: int) -> PlainRange:
        asked.append(device)
        return PlainRange(torch.device("cpu"))

    assert can_have_blocks(torch.device("cpu"))
    assert not can_have_blocks(torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cache_blocks, "open_range", open_plain)
    assert not can_have_blocks(torch.device("cuda", 7)) and asked == [torch.device("cuda", 7)]


def test_memory_of_a_gpu_goes_back_late_and_is_taken_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Giving it back waits for the device, and other streams may still be at work on it."""
    log, device = [], torch.device("cuda", 0)

    class Orders:
        def __init__(self, of: torch.device) -> None:
            assert of == device

        def enter(self) -> None:
            log.append("enter")

        def leave(self) -> None:
            log.append("leave")

    class Range(CpuRange):
        def make_readable(self, nbytes: int) -> None:
            self.map_to(nbytes)  # as a GPU's does at both ends

    on_cpu, view = torch.device("cpu"), cache_blocks.view_addresses
    monkeypatch.setattr(cache_blocks, "count_addresses", lambda of: 1 << 30)
    monkeypatch.setattr(cache_blocks, "open_range", lambda of, nbytes: Range(nbytes))
    monkeypatch.setattr(cache_blocks, "view_addresses", lambda r, n, of: view(r, n, on_cpu))
    monkeypatch.setattr(cache_blocks, "StreamOrders", Orders)
    blocks = CacheBlocks(CHUNK_NBYTES, lambda nbytes: None, device)
    assert blocks.mapped_nbytes > 0  # whose memory an address is, PyTorch asks of what is mapped
    for _ in range(cache_blocks.QUIET + 1):
        ids = blocks.take(4)
        assert blocks.mapped_nbytes == 4 * CHUNK_NBYTES
        blocks.note_use()
        blocks.release(ids)
    assert log[:3] == ["enter", "leave", "enter"]
    assert 0 < blocks.mapped_nbytes <= CHUNK_NBYTES and blocks.used == 0
