"""The CUDA driver's virtual memory, against a stand-in that records and checks every call."""

import gc
import threading
from enum import IntEnum
from types import SimpleNamespace

import pytest

from turbotx.errors import TurbotxError
from turbotx.memory.capture_lock import capture_lock
from turbotx.memory.cuda_range import CudaMemoryError, CudaRange, MemoryExhausted
from turbotx.memory.planner import CHUNK_NBYTES

BASE = 1 << 44


class Result(IntEnum):
    SUCCESS = 0
    INVALID_VALUE = 1
    OUT_OF_MEMORY = 2


class RecordingDriver:
    """Keeps the books of a device of 64 chunks, and refuses what a real driver would."""

    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)

    def __init__(self):
        self.calls, self.fail = [], {}
        self.reserved, self.handles, self.mapped, self.access = {}, {}, {}, {}

    def CUmemAllocationProp(self):
        return SimpleNamespace(type=0, location=SimpleNamespace(type=0, id=-1))

    def CUmemAccessDesc(self):
        return SimpleNamespace(location=None, flags=0)

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments):
            self.calls.append(name)
            if name in self.fail:
                return (self.fail[name],)
            return getattr(self, "do_" + name)(*arguments)

        return call

    def do_cuMemGetAllocationGranularity(self, prop, flag):
        assert prop.type == 1
        assert (prop.location.type, prop.location.id) == (1, 3)
        return Result.SUCCESS, CHUNK_NBYTES

    def do_cuDeviceTotalMem(self, device):
        return Result.SUCCESS, 64 * CHUNK_NBYTES

    def do_cuMemAddressReserve(self, nbytes, alignment, hint, flags):
        assert nbytes % CHUNK_NBYTES == 0
        self.reserved[BASE] = nbytes
        return Result.SUCCESS, BASE

    def do_cuMemAddressFree(self, address, nbytes):
        assert not self.mapped
        assert self.reserved.pop(address) == nbytes
        return (Result.SUCCESS,)

    def do_cuMemCreate(self, nbytes, prop, flags):
        assert nbytes % CHUNK_NBYTES == 0
        if sum(self.handles.values()) + nbytes > 64 * CHUNK_NBYTES:
            return Result.OUT_OF_MEMORY, None
        handle = 100 + len(self.calls)
        self.handles[handle] = nbytes
        return Result.SUCCESS, handle

    def do_cuMemMap(self, address, nbytes, offset, handle, flags):
        assert self.handles[handle] == nbytes
        assert address >= BASE
        assert address + nbytes <= BASE + self.reserved[BASE]
        taken = [(a, a + n) for a, (n, _) in self.mapped.items()]
        assert all(address + nbytes <= low or high <= address for low, high in taken)
        self.mapped[address] = (nbytes, handle)
        return (Result.SUCCESS,)

    def do_cuMemSetAccess(self, address, nbytes, descriptions, count):
        assert self.mapped[address][0] == nbytes
        assert len(descriptions) == count == 1
        assert descriptions[0].location.id == 3
        self.access[address] = descriptions[0].flags
        return (Result.SUCCESS,)

    def do_cuMemUnmap(self, address, nbytes):
        assert self.mapped.pop(address)[0] == nbytes
        self.access.pop(address, None)
        return (Result.SUCCESS,)

    def do_cuMemRelease(self, handle):
        assert handle not in [h for _, h in self.mapped.values()]
        del self.handles[handle]
        return (Result.SUCCESS,)


@pytest.fixture
def driver():
    return RecordingDriver()


def open_range(driver):
    def synchronize():
        assert capture_lock.is_held_here, "a graph may be being captured"
        driver.calls.append("synchronize")

    return CudaRange(3, 1 << 40, driver, synchronize)


def test_both_ends_can_be_shown_while_the_middle_has_no_memory(driver):
    memory = open_range(driver)
    memory.make_readable(CHUNK_NBYTES + 1)
    assert memory.mapped_nbytes == 2 * CHUNK_NBYTES
    ends = sorted(driver.mapped)
    last = BASE + memory.capacity_nbytes - 2 * CHUNK_NBYTES
    assert ends == [BASE, last] and set(driver.access) >= set(ends)
    memory.make_readable(CHUNK_NBYTES + 1)  # once
    memory.map_to(8 * CHUNK_NBYTES)
    memory.unmap_to(1)
    assert sorted(driver.mapped) == [BASE, last], "they stay"
    with pytest.raises(MemoryExhausted, match="addresses reserved"):
        memory.map_to(memory.capacity_nbytes - CHUNK_NBYTES)
    del memory
    gc.collect()
    assert not driver.mapped and not driver.handles and not driver.reserved


def test_growth_maps_behind_what_is_mapped_and_the_address_stays(driver):
    memory = open_range(driver)
    assert memory.capacity_nbytes == 128 * CHUNK_NBYTES
    for chunks in (1, 3, 2, 7):
        memory.map_to(chunks * CHUNK_NBYTES)
    assert memory.address == BASE
    assert memory.mapped_nbytes == 7 * CHUNK_NBYTES
    assert {a: n for a, (n, _) in driver.mapped.items()} == {
        BASE: CHUNK_NBYTES,
        BASE + CHUNK_NBYTES: 2 * CHUNK_NBYTES,
        BASE + 3 * CHUNK_NBYTES: 4 * CHUNK_NBYTES,
    }
    assert driver.access == dict.fromkeys(driver.mapped, 3)
    assert driver.calls.count("cuMemCreate") == 3


def test_shrinking_releases_whole_growths_after_the_device_is_idle(driver):
    memory = open_range(driver)
    for chunks in (2, 5, 9):
        memory.map_to(chunks * CHUNK_NBYTES)
    memory.unmap_to(6 * CHUNK_NBYTES)  # the growth to 9 began at 5 and stays
    assert memory.mapped_nbytes == 9 * CHUNK_NBYTES
    assert "synchronize" not in driver.calls
    memory.unmap_to(3 * CHUNK_NBYTES)
    assert memory.mapped_nbytes == 5 * CHUNK_NBYTES
    assert driver.calls[-3:] == ["synchronize", "cuMemUnmap", "cuMemRelease"]
    memory.map_to(6 * CHUNK_NBYTES)
    assert sum(driver.handles.values()) == memory.mapped_nbytes == 6 * CHUNK_NBYTES


def test_everything_is_given_back_with_the_range(driver):
    memory = open_range(driver)
    memory.map_to(4 * CHUNK_NBYTES)
    memory.map_to(8 * CHUNK_NBYTES)
    del memory
    gc.collect()
    assert driver.calls.index("synchronize") < driver.calls.index("cuMemUnmap")
    assert not driver.mapped
    assert not driver.handles
    assert not driver.reserved


def test_a_range_that_ends_during_a_capture_is_given_back_after_it(driver):
    memory = open_range(driver)
    memory.map_to(CHUNK_NBYTES)
    with capture_lock:
        del memory
        gc.collect()
        assert driver.mapped
        with pytest.raises(TurbotxError, match="while this thread captures"), capture_lock:
            pass
    assert not driver.mapped
    assert not driver.reserved


def test_shrinking_waits_for_another_threads_capture(driver):
    memory = open_range(driver)
    memory.map_to(CHUNK_NBYTES)
    shrinking = threading.Thread(target=memory.unmap_to, args=(0,))
    with capture_lock:
        shrinking.start()
        shrinking.join(0.05)
        assert shrinking.is_alive()
        assert driver.mapped
    shrinking.join()
    assert not driver.mapped


def test_a_release_that_fails_is_a_warning_and_others_follow():
    done = []

    def refuse():
        raise CudaMemoryError("cuMemUnmap failed with 1")

    def release_both():
        with capture_lock:
            capture_lock.when_free(refuse)
            capture_lock.when_free(lambda: done.append(True))
            assert not done

    with pytest.warns(RuntimeWarning, match="could not be given back: cuMemUnmap failed with 1"):
        release_both()
    assert done


def test_out_of_memory_is_clear_and_leaves_the_range_working(driver):
    memory = open_range(driver)
    memory.map_to(CHUNK_NBYTES)
    with pytest.raises(MemoryExhausted, match="out of memory"):
        memory.map_to(65 * CHUNK_NBYTES)
    with pytest.raises(MemoryExhausted, match="addresses"):
        memory.map_to(129 * CHUNK_NBYTES)
    memory.map_to(2 * CHUNK_NBYTES)
    assert memory.mapped_nbytes == 2 * CHUNK_NBYTES == sum(driver.handles.values())


@pytest.mark.parametrize("name", ["cuMemMap", "cuMemSetAccess"])
def test_a_failure_half_way_leaks_nothing(driver, name):
    memory = open_range(driver)
    memory.map_to(CHUNK_NBYTES)
    driver.fail[name] = Result.INVALID_VALUE
    with pytest.raises(CudaMemoryError, match=name):
        memory.map_to(3 * CHUNK_NBYTES)
    assert memory.mapped_nbytes == CHUNK_NBYTES == sum(driver.handles.values())
    assert len(driver.mapped) == 1
    driver.fail.clear()
    memory.map_to(3 * CHUNK_NBYTES)
    assert memory.mapped_nbytes == 3 * CHUNK_NBYTES


def test_the_names_used_here_are_those_of_the_real_bindings():
    pytest.importorskip("cuda.bindings")
    from cuda.bindings import driver

    from turbotx.memory.cuda_range import make_access, make_property

    allocation = make_property(driver, 3)
    assert allocation.location.id == 3
    assert make_access(driver, allocation).location.id == 3
    for name in ("Create", "Map", "SetAccess", "Unmap", "Release", "AddressReserve", "AddressFree"):
        assert callable(getattr(driver, "cuMem" + name))
    assert callable(driver.cuDeviceTotalMem)
