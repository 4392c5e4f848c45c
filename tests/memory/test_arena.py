"""How an arena picks its memory and orders streams, with CUDA replaced by stand-ins."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from turbotx.memory import arena as arena_module
from turbotx.memory.arena import StreamOrder, _CudaBytes, open_range
from turbotx.memory.cpu_range import CpuRange
from turbotx.memory.cuda_range import CudaMemoryError

CUDA = torch.device("cuda", 1)


@pytest.fixture
def made(monkeypatch):
    """Records how ranges are made; no device is touched."""
    made = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: made.append("synchronize"))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(arena_module, "PlainRange", lambda device: ("plain", device))
    return made


def test_cpu_memory_is_a_reserved_range():
    assert isinstance(open_range(torch.device("cpu"), 1 << 30), CpuRange)


def test_cuda_memory_is_the_drivers_after_the_context_exists(monkeypatch, made):
    driver = ModuleType("cuda.bindings.driver")
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", ModuleType("cuda.bindings"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)

    def make(index, nbytes, given, synchronize):
        assert given is driver
        made.append((index, nbytes))
        return memory

    memory = SimpleNamespace(map_to=made.append, unmap_to=made.append)
    monkeypatch.setattr(arena_module, "CudaRange", make)
    assert open_range(CUDA, 1 << 40) is memory
    # It is tried before anything relies on it: some machines reserve addresses and never back them.
    assert made == ["synchronize", (1, 1 << 40), 1, 0]

    def refuse(*arguments):
        raise CudaMemoryError("the CUDA driver's cuMemAddressReserve failed with 801")

    monkeypatch.setattr(arena_module, "CudaRange", refuse)
    with pytest.warns(RuntimeWarning, match="failed with 801; arenas are plain allocations"):
        assert open_range(CUDA, 1 << 40) == ("plain", CUDA)


def test_without_the_bindings_it_is_a_plain_allocation_and_says_so(monkeypatch, made):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.warns(RuntimeWarning, match="install cuda-bindings"):
        assert open_range(CUDA, 1 << 40) == ("plain", CUDA)


def test_amd_devices_take_a_plain_allocation(monkeypatch, made):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert open_range(CUDA, 1 << 40) == ("plain", CUDA)


def test_torch_is_shown_the_mapped_bytes_and_keeps_the_range_alive():
    memory = SimpleNamespace(mapped_nbytes=4 << 20, address=1 << 44)
    shown = _CudaBytes(memory)
    assert shown.memory is memory
    assert shown.__cuda_array_interface__ == {
        "shape": (4 << 20,),
        "typestr": "|u1",
        "data": (1 << 44, False),
        "version": 2,
    }


def test_only_a_change_of_stream_waits(monkeypatch):
    waits = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            waits.append((self.name, other.name))

    first, second = Stream("first"), Stream("second")
    now = [first]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[0])
    order = StreamOrder(CUDA)
    for stream in (first, first, second, second, first):
        now[0] = stream
        order.enter()
        order.leave()
    assert waits == [("second", "first"), ("first", "second")]
