"""How an arena picks its memory and orders streams, with CUDA replaced by stand-ins."""

import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch

from turbotx.memory import arena as arena_module
from turbotx.memory.arena import CudaBytes, PlainRange, StreamOrder, StreamOrders, open_range
from turbotx.memory.capture_lock import capture_lock
from turbotx.memory.cpu_range import CpuRange, MemoryExhausted
from turbotx.memory.cuda_range import CudaMemoryError
from turbotx.memory.planner.plan import CHUNK_NBYTES

CUDA = torch.device("cuda", 1)


@pytest.fixture
def made(monkeypatch):
    """Records how ranges are made; no device is touched."""
    made = []

    class Event:
        def record(self):
            made.append("event")

    def synchronize(device):
        assert capture_lock.is_held_here
        made.append("synchronize")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(arena_module, "PlainRange", lambda device: ("plain", device))
    return made


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
def test_a_vector_may_hang_over_either_end_of_cpu_memory():
    memory = open_range(torch.device("cpu"), 1 << 32)
    for nbytes in (CHUNK_NBYTES, 4 * CHUNK_NBYTES):
        memory.map_to(nbytes)
        with open("/proc/self/maps") as lines:
            spans = [line.split()[:2] for line in lines]
        readable = [span.split("-") for span, flags in spans if flags[0] == "r"]
        for place in (memory.address - 64, memory.address + nbytes + 63):
            assert any(int(a, 16) <= place < int(b, 16) for a, b in readable)


def test_cpu_memory_is_a_reserved_range():
    assert isinstance(open_range(torch.device("cpu"), 1 << 30), CpuRange)


class Range:
    """A range over memory of the host; `change` is what is wrong with it."""

    def __init__(self, made, **change):
        self.made, self.bytes = made, torch.zeros(64, dtype=torch.uint8)
        self.address = self.bytes.data_ptr()
        vars(self).update(change)

    def map_to(self, nbytes):
        self.made.append(("map", nbytes))

    def unmap_to(self, nbytes):
        self.made.append(("unmap", nbytes))

    def close(self):
        self.made.append("close")


@pytest.fixture
def opened(monkeypatch, made):
    """Opens a range whose driver makes `Range`s with these changes."""

    def view(memory, device):
        made.append("view")
        return memory.bytes

    def open_with(**change):
        driver = ModuleType("cuda.bindings.driver")
        monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
        monkeypatch.setitem(sys.modules, "cuda.bindings", ModuleType("cuda.bindings"))
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)

        def make(index, nbytes, given, synchronize):
            assert given is driver
            made.append((index, nbytes))
            return Range(made, **change)

        monkeypatch.setattr(arena_module, "CudaRange", make)
        monkeypatch.setattr(arena_module, "view_range", change.pop("view", view))
        return open_range(CUDA, 1 << 40)

    return open_with


def test_cuda_memory_is_the_drivers_after_it_was_tried_as_a_tensor(opened, made):
    memory = opened()
    assert isinstance(memory, Range)
    # The context is there, without waiting for a device that another thread may capture on.
    assert made == ["event", (1, 1 << 40), ("map", 1), "view", ("unmap", 0)]
    assert memory.bytes[0] == memory.bytes[-1] != 0


def fail(error):
    def raise_it(*arguments):
        raise error

    return raise_it


class Forgetful(torch.Tensor):
    def fill_(self, value):
        return self


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"map_to": fail(CudaMemoryError("cuMemMap failed with 801"))}, "cuMemMap failed with 801"),
        ({"map_to": fail(MemoryExhausted("no addresses"))}, "MemoryExhausted: no addresses"),
        ({"view": fail(RuntimeError("not a device pointer"))}, "not a device pointer"),
        ({"address": 64}, "copied the mapped memory"),
        ({"bytes": torch.zeros(64).byte().as_subclass(Forgetful)}, r"were read back as \[0, 0\]"),
        ({"unmap_to": fail(RuntimeError("an illegal access"))}, "an illegal access"),
    ],
)
def test_what_cannot_be_used_as_a_tensor_is_given_back(opened, made, change, words):
    if "bytes" in change:
        change = {**change, "address": change["bytes"].data_ptr()}
    with pytest.warns(RuntimeWarning, match=f"arenas are plain allocations.*{words}"):
        assert opened(**change) == ("plain", CUDA)
    assert made[-1] == "close"


def test_a_driver_without_virtual_memory_leaves_plain_allocations(monkeypatch, opened):
    opened()
    monkeypatch.setattr(arena_module, "CudaRange", fail(CudaMemoryError("failed with 801")))
    with pytest.warns(RuntimeWarning, match="arenas are plain allocations.*failed with 801"):
        assert open_range(CUDA, 1 << 40) == ("plain", CUDA)


def test_without_the_bindings_it_is_a_plain_allocation_and_says_so(monkeypatch, made):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.warns(RuntimeWarning, match="install cuda-bindings"):
        assert open_range(CUDA, 1 << 40) == ("plain", CUDA)


def test_amd_devices_take_a_plain_allocation(monkeypatch, made):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert open_range(CUDA, 1 << 40) == ("plain", CUDA)


def test_a_plain_allocation_is_replaced_after_the_device_is_idle(monkeypatch, made):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: made.append(device))
    memory = PlainRange(torch.device("cpu"))
    made_of = torch.empty
    memory.tensor = SimpleNamespace(device=CUDA)
    monkeypatch.setattr(torch, "empty", lambda n, dtype, device: made_of(n, dtype=dtype))
    memory.map_to(64)
    assert made == []  # nothing was there for another stream to work on
    memory.tensor = SimpleNamespace(device=CUDA)
    memory.map_to(128)
    assert made == [CUDA]


def test_torch_is_shown_the_mapped_bytes_and_keeps_the_range_alive():
    memory = SimpleNamespace(mapped_nbytes=4 << 20, address=1 << 44)
    shown = CudaBytes(memory, memory.mapped_nbytes)
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
            self.name, self.cuda_stream = name, len(name)

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


def test_memory_of_many_streams_is_taken_after_all_of_them(monkeypatch):
    waits = []

    class Event:
        def record(self, stream):
            self.of = stream.cuda_stream

    class Stream:
        def __init__(self, handle):
            self.cuda_stream = handle

        def wait_event(self, event):
            waits.append((self.cuda_stream, event.of))

    now = [Stream(1)]
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[0])
    orders = StreamOrders(CUDA)
    for handle in (1, 2, 3, 1):
        now[0] = Stream(handle)
        orders.leave()
    orders.enter()
    assert waits == [(1, 2), (1, 3)]
