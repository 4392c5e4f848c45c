"""The chunk pool: one address, growth by chunks, leases that wait, and errors that heal."""

import threading

import pytest
import torch

from turbotx.memory import pool as pool_module
from turbotx.memory.arena import PlainRange
from turbotx.memory.cpu_range import CpuRange, total_nbytes
from turbotx.memory.planner import CHUNK_NBYTES
from turbotx.memory.pool import ChunkPool, MemoryExhausted, PoolBusy, poison

CPU = torch.device("cpu")


def test_an_arena_grows_by_chunks_and_keeps_its_address_and_contents():
    pool = ChunkPool(CPU)
    arena = pool.ensure(100)
    address = arena.data_ptr
    assert arena.tensor.shape == (CHUNK_NBYTES,)
    assert arena.tensor.data_ptr() == address
    assert address % CHUNK_NBYTES == 0
    arena.tensor[:4] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    pool.ensure(CHUNK_NBYTES + 1)
    assert arena.data_ptr == address
    assert arena.tensor.shape == (2 * CHUNK_NBYTES,)
    assert arena.tensor[:4].tolist() == [1, 2, 3, 4]
    assert pool.stats().chunk_allocations == 2
    assert arena.generation == 0


def test_a_shape_that_fits_asks_the_device_for_nothing():
    pool = ChunkPool(CPU)
    pool.reserve(10 * CHUNK_NBYTES)
    for nbytes in (5, CHUNK_NBYTES, 10 * CHUNK_NBYTES, 7):
        with pool.lease(nbytes) as arena:
            arena.tensor[nbytes - 1] = 1
    stats = pool.stats()
    assert stats.chunk_allocations == 1
    assert stats.mapped_nbytes == stats.peak_nbytes == 10 * CHUNK_NBYTES
    assert stats.used_nbytes == 0


def test_a_tensor_outlives_the_pool():
    view = ChunkPool(CPU).ensure(64).tensor
    view.fill_(7)
    assert int(view.sum()) == 7 * CHUNK_NBYTES


def test_byte_counts_beyond_two_to_the_31():
    with ChunkPool(CPU).lease((1 << 31) + 4096) as arena:
        arena.tensor[-1] = 9
        assert arena.tensor.numel() == (1 << 31) + CHUNK_NBYTES
        assert arena.tensor[-1] == 9


def test_concurrent_leases_have_memory_of_their_own():
    pool = ChunkPool(CPU, max_arenas=2)
    with pool.lease(64) as first, pool.lease(64) as second:
        assert first is not second
        assert abs(first.data_ptr - second.data_ptr) >= CHUNK_NBYTES
        with pytest.raises(PoolBusy, match="all 2 arenas"), pool.lease(64, timeout_s=0.01):
            pass
    with pool.lease(64, timeout_s=0.01) as again:
        assert again in (first, second)
    assert pool.stats().waits == 1


def test_threads_wait_for_an_arena_and_never_share_one():
    pool = ChunkPool(CPU, max_arenas=2, trim_after=3)
    inside, most, clashes = [], [], []

    def work(stamp):
        for step in range(25):
            nbytes = CHUNK_NBYTES * (1 + (stamp * 7 + step) % 4)
            with pool.lease(nbytes) as arena:
                inside.append(stamp)
                most.append(len(inside))
                arena.tensor[:4096].fill_(stamp)
                arena.tensor[nbytes - 4096 : nbytes].fill_(stamp)
                edges = torch.cat([arena.tensor[:4096], arena.tensor[nbytes - 4096 : nbytes]])
                if not bool((edges == stamp).all()):
                    clashes.append(stamp)
                inside.remove(stamp)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert not clashes
    assert max(most) <= 2
    assert pool.stats().arenas <= 2
    assert pool.stats().used_nbytes == 0


def test_the_limit_is_a_clear_error_and_the_pool_still_works():
    pool = ChunkPool(CPU, limit_nbytes=4 * CHUNK_NBYTES)
    with pytest.raises(MemoryExhausted, match="raise limit_nbytes"), pool.lease(1 << 40):
        pass
    with pool.lease(4 * CHUNK_NBYTES) as arena:
        arena.tensor.fill_(1)
    assert pool.stats().mapped_nbytes == 4 * CHUNK_NBYTES


def test_at_the_limit_idle_memory_moves_and_busy_memory_is_waited_for():
    pool = ChunkPool(CPU, limit_nbytes=4 * CHUNK_NBYTES, max_arenas=3)
    with pool.lease(CHUNK_NBYTES), pool.lease(3 * CHUNK_NBYTES):
        pass  # two arenas idle, the limit reached
    with pool.lease(4 * CHUNK_NBYTES):
        assert pool.stats().mapped_nbytes == 4 * CHUNK_NBYTES
        with pytest.raises(PoolBusy), pool.lease(CHUNK_NBYTES, timeout_s=0.01):
            pass


def test_a_system_without_memory_is_a_clear_error_and_heals():
    left = [3 * CHUNK_NBYTES]
    pool = ChunkPool(CPU, open_memory=lambda d, n: CpuRange(n, available=lambda: left[0]))
    with pytest.raises(MemoryExhausted, match="the system has only"), pool.lease(1 << 30):
        pass
    with pool.lease(CHUNK_NBYTES) as arena:
        arena.tensor.fill_(1)
    left[0] = 1 << 31
    with pool.lease(1 << 30) as arena:
        assert arena.mapped_nbytes == 1 << 30


def test_an_arena_cannot_outgrow_its_addresses():
    pool = ChunkPool(CPU, open_memory=lambda d, n: CpuRange(1 << 30, available=lambda: None))
    with pytest.raises(MemoryExhausted, match="addresses reserved"), pool.lease((1 << 30) + 1):
        pass


def test_many_pools_fit_the_addresses_of_a_process():
    """A process has 128 TiB of them, which 128 pools of 1 TiB each used up."""
    total = total_nbytes() or 0
    pools = [ChunkPool(CPU) for _ in range(300 if total < 1 << 37 else 30)]
    arenas = [pool.ensure(100) for pool in pools]
    assert all(arena.mapped_nbytes == CHUNK_NBYTES for arena in arenas)
    assert CpuRange(1 << 60).capacity_nbytes >= total


def test_trimming_waits_for_a_long_quiet_run():
    pool = ChunkPool(CPU, trim_after=3)
    large, small = 8 * CHUNK_NBYTES, 2 * CHUNK_NBYTES
    for nbytes in (large, small, small, large, small, small):
        with pool.lease(nbytes):
            pass
    assert pool.stats().trims == 0
    with pool.lease(64) as arena:
        address = arena.data_ptr
    assert pool.stats().trims == 1
    assert pool.stats().mapped_nbytes == small
    with pool.lease(large) as arena:
        assert arena.data_ptr == address
        assert int(arena.tensor[-1]) == 0


def test_trimming_on_request_keeps_what_is_reserved():
    pool = ChunkPool(CPU)
    pool.reserve(2 * CHUNK_NBYTES)
    pool.ensure(9 * CHUNK_NBYTES)
    assert pool.trim(5 * CHUNK_NBYTES) == 4 * CHUNK_NBYTES
    assert pool.trim() == 3 * CHUNK_NBYTES
    assert pool.stats().mapped_nbytes == 2 * CHUNK_NBYTES


def test_a_plain_allocation_says_when_it_moved():
    pool = ChunkPool(CPU, open_memory=lambda device, nbytes: PlainRange(device))
    arena = pool.ensure(64)
    assert not arena.stable
    before = arena.generation
    for chunks in (2, 40, 300):
        address = arena.data_ptr
        pool.ensure(chunks * CHUNK_NBYTES)
        assert arena.tensor.data_ptr() == arena.data_ptr
        assert (arena.generation == before) == (arena.data_ptr == address)
        before = arena.generation


def test_poison_reads_as_nan():
    with ChunkPool(CPU).lease(64) as arena:
        poison(arena.tensor)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            assert bool(arena.tensor.view(dtype).isnan().all())


def test_the_environment_asks_for_poison(monkeypatch):
    pool = ChunkPool(CPU)
    with pool.lease(64) as arena:
        arena.tensor.fill_(0)
    monkeypatch.setenv("TURBOTX_POISON", "1")
    with pool.lease(64) as arena:
        assert bool(arena.tensor.view(torch.float32).isnan().all())


def test_a_lease_that_fails_to_begin_gives_its_arena_back(monkeypatch):
    pool = ChunkPool(CPU, max_arenas=1)
    monkeypatch.setenv("TURBOTX_POISON", "1")
    monkeypatch.setattr(pool_module, "poison", lambda tensor: 1 / 0)
    with pytest.raises(ZeroDivisionError), pool.lease(64):
        pass
    monkeypatch.delenv("TURBOTX_POISON")
    with pool.lease(64, timeout_s=0.01):
        assert pool.stats().used_nbytes == 64
    assert pool.stats().used_nbytes == 0


def test_an_error_inside_a_lease_gives_its_arena_back():
    pool = ChunkPool(CPU, max_arenas=1)
    with pytest.raises(KeyError), pool.lease(64):
        raise KeyError
    with pool.lease(64, timeout_s=0.01):
        pass


def test_an_arena_that_could_not_be_cut_is_leased_again(monkeypatch):
    pool = ChunkPool(CPU, max_arenas=1, trim_after=2)
    pool.ensure(8 * CHUNK_NBYTES)

    def refuse(arena, nbytes):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(pool_module.Arena, "shrink", refuse)
    with pool.lease(64):
        pass
    with pytest.raises(RuntimeError, match="illegal memory access"), pool.lease(64):
        pass
    assert pool.stats().used_nbytes == 0
    with pytest.raises(RuntimeError, match="illegal memory access"), pool.lease(64, timeout_s=0.01):
        pass
