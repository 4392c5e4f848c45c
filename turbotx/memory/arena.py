"""One arena: a flat uint8 tensor over a range of memory that grows without moving.

In: byte counts. Out: a tensor over mmap on CPUs, over the driver's virtual memory on CUDA, or over
a plain allocation if neither is available (growing then moves it)::

    arena = Arena(open_range(torch.device("cpu"), 1 << 40), index=0, chunk_nbytes=CHUNK_NBYTES)
    arena.grow(3_000_000); arena.tensor.shape        # (4194304,)
"""

from __future__ import annotations

import ctypes
import importlib
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch

from turbotx.memory.capture_lock import capture_lock
from turbotx.memory.cpu_range import CpuRange, MemoryExhausted, load_libc
from turbotx.memory.cuda_range import CudaRange
from turbotx.memory.planner.plan import align

_PROBE_BYTE = 0xA5


class AddressRange(Protocol):
    """Memory that is backed from its first byte up; `stable` if growing does not move it."""

    stable: bool
    mapped_nbytes: int

    @property
    def address(self) -> int:
        """Address of the first byte; constant if `stable`, otherwise until the next `map_to` or
        `unmap_to`."""

    def map_to(self, nbytes: int) -> None:
        """Back at least the first `nbytes` bytes with memory; raise MemoryExhausted if there is
        none."""

    def unmap_to(self, nbytes: int) -> None:
        """Return the memory behind all but the first `nbytes` bytes."""


class PlainRange:
    """A torch allocation, replaced by a larger one to grow: the fallback."""

    stable = False

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.empty(0, dtype=torch.uint8, device=device)
        self.mapped_nbytes = 0

    @property
    def address(self) -> int:
        """Address of the tensor that backs the range; changes with a resize."""
        return self.tensor.data_ptr()

    def map_to(self, nbytes: int) -> None:
        """Replace the tensor by one of `nbytes` if that is larger; contents are lost."""
        if nbytes > self.mapped_nbytes:
            self._replace(nbytes)

    def unmap_to(self, nbytes: int) -> None:
        """Replace the tensor by one of `nbytes` if that is smaller; contents are lost."""
        if nbytes < self.mapped_nbytes:
            self._replace(nbytes)

    def _replace(self, nbytes: int) -> None:
        device = self.tensor.device
        if device.type == "cuda" and self.mapped_nbytes:
            with capture_lock:
                torch.cuda.synchronize(device)  # another stream may still be using it
        # Free the old tensor first, so that both are never allocated at once.
        self.tensor = torch.empty(0, dtype=torch.uint8, device=device)
        self.mapped_nbytes = 0
        try:
            with torch.inference_mode(False):  # the tensor must be writable in any mode
                self.tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)
        except RuntimeError as error:  # torch's OutOfMemoryError and CPU allocator errors
            raise MemoryExhausted(
                f"{device} has no {nbytes} bytes for an arena; use smaller batches or shorter "
                f"sequences"
            ) from error
        self.mapped_nbytes = nbytes


class CudaBytes:
    """Lets torch view memory that it did not allocate; keeps the range alive."""

    def __init__(self, memory: AddressRange, nbytes: int) -> None:
        self.memory = memory
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (memory.address, False),
            "version": 2,
        }


def open_range(device: torch.device, address_nbytes: int) -> AddressRange:
    """Return the best kind of range for this device; falls back to a plain allocation."""
    if device.type == "cpu" and load_libc() is not None:
        return CpuRange(address_nbytes)
    if device.type == "cuda" and torch.version.hip is None:
        return _open_cuda(device, address_nbytes)
    return PlainRange(device)


def _open_cuda(device: torch.device, address_nbytes: int) -> AddressRange:
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError:
        warnings.warn(
            "cuda-bindings is not installed, so arenas are plain allocations, which move when "
            "they grow: reserve the largest shape first, or install cuda-bindings",
            RuntimeWarning,
        )
        return PlainRange(device)
    # An event creates the device's context, which the driver calls need, without synchronizing.
    with torch.cuda.device(device):
        torch.cuda.Event().record()
    index = torch.cuda.current_device() if device.index is None else device.index
    memory = None
    try:
        memory = CudaRange(index, address_nbytes, driver, lambda: torch.cuda.synchronize(device))
        _try_out(memory, device)
        return memory
    except Exception as error:  # a plain allocation still works
        reason = f"{type(error).__name__}: {error}"
    if memory is not None:
        memory.close()
    warnings.warn(
        f"virtual memory of {device} cannot be used, so arenas are plain allocations, which move "
        f"when they grow: {reason}",
        RuntimeWarning,
    )
    return PlainRange(device)


def _try_out(memory: CudaRange, device: torch.device) -> None:
    """Use a new range once, as arenas will; raise the error that this causes, or RuntimeError.

    Some virtual machines reserve addresses but cannot back them, and PyTorch may not accept mapped
    memory as a tensor.
    """
    memory.map_to(1)
    tensor = view_range(memory, device)
    if tensor.data_ptr() != memory.address:
        raise RuntimeError("PyTorch copied the mapped memory instead of making a view")
    ends = tensor.fill_(_PROBE_BYTE)[:: tensor.numel() - 1].tolist()
    if ends != [_PROBE_BYTE] * 2:
        raise RuntimeError(f"bytes written as {_PROBE_BYTE} were read back as {ends}")
    del tensor
    memory.unmap_to(0)


def view_range(memory: AddressRange, device: torch.device) -> torch.Tensor:
    """Return the mapped bytes as a uint8 tensor that keeps the range alive and can be written to
    both inside and outside of `torch.inference_mode`."""
    if isinstance(memory, PlainRange):
        return memory.tensor
    if not memory.mapped_nbytes:
        return torch.empty(0, dtype=torch.uint8, device=device)
    return view_addresses(memory, memory.mapped_nbytes, device)


def view_addresses(memory: AddressRange, nbytes: int, device: torch.device) -> torch.Tensor:
    """Return the first `nbytes` addresses of a range that does not move, mapped or not, as
    `view_range` does those that are; what is not mapped must not be touched. On a GPU the first
    byte has to be mapped."""
    if device.type == "cuda":
        with torch.inference_mode(False):
            return torch.as_tensor(CudaBytes(memory, nbytes), device=device)
    raw: Any = (ctypes.c_uint8 * nbytes).from_address(memory.address)
    raw.owner = memory
    with torch.inference_mode(False):
        return torch.frombuffer(raw, dtype=torch.uint8)


def current_handle(device: torch.device) -> int:
    """Return the handle of the current stream of a CUDA device."""
    get = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # private, as Inductor uses
    if get is None or device.index is None:
        return int(torch.cuda.current_stream(device).cuda_stream)
    return int(get(device.index))


class StreamOrder:
    """Orders uses of an arena by different streams.

    A new user's stream waits for what the last user's stream has queued; no cost while only one
    stream is used. A lease must begin before a CUDA graph's capture does: a captured stream cannot
    wait for one that is not captured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: Any = None
        self._handle: int | None = None

    def enter(self) -> None:
        """Make the current stream wait for the last user's, if that is another one."""
        if self._last is not None and current_handle(self._device) != self._handle:
            torch.cuda.current_stream(self._device).wait_stream(self._last)

    def leave(self) -> None:
        """Record the current stream as the last user."""
        handle = current_handle(self._device)
        if handle != self._handle:
            self._handle, self._last = handle, torch.cuda.current_stream(self._device)


class StreamOrders:
    """Makes the next user of memory wait for its previous users, which may be on other streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: dict[int, torch.cuda.Event] = {}

    def enter(self) -> None:
        """Make the current stream wait for what other streams recorded in `leave`."""
        current = torch.cuda.current_stream(self._device)
        for handle, event in self._last.items():
            if handle != current.cuda_stream:
                current.wait_event(event)

    def leave(self) -> None:
        """Record what the current stream has queued by now."""
        current = torch.cuda.current_stream(self._device)
        event = self._last.setdefault(current.cuda_stream, torch.cuda.Event())
        event.record(current)


class Arena:
    """Memory for one execution at a time.

    `tensor` (uint8, flat) covers all of it and is replaced after each growth. `generation` changes
    whenever the address does, which happens only if the range is not stable. `shrinks` counts how
    often memory was returned, after which a CUDA graph over it must not be replayed.
    """

    def __init__(
        self, memory: AddressRange, device: torch.device, index: int, chunk_nbytes: int
    ) -> None:
        self._memory = memory
        self._device = device
        self._chunk_nbytes = chunk_nbytes
        self.index = index
        self.generation = self.shrinks = 0
        self.used_nbytes = 0
        self.tensor = view_range(memory, device)
        self.order = StreamOrder(device) if device.type == "cuda" else None

    @property
    def data_ptr(self) -> int:
        """Address of the arena's first byte."""
        return self._memory.address

    @property
    def mapped_nbytes(self) -> int:
        """Bytes backed by memory, in whole chunks."""
        return self._memory.mapped_nbytes

    @property
    def stable(self) -> bool:
        """Whether the address never changes."""
        return self._memory.stable

    def whole_chunks(self, nbytes: int) -> int:
        """Return `nbytes` rounded up to whole chunks."""
        return align(nbytes, self._chunk_nbytes)

    def grow(self, nbytes: int) -> None:
        """Map at least `nbytes`. Raises MemoryExhausted; the arena is then unchanged or empty."""
        self._resize(self._memory.map_to, self.whole_chunks(nbytes))

    def shrink(self, nbytes: int) -> None:
        """Return memory beyond the first `nbytes`, in whole chunks, to the device."""
        self.shrinks += 1
        self._resize(self._memory.unmap_to, self.whole_chunks(nbytes))

    def _resize(self, change: Callable[[int], None], nbytes: int) -> None:
        before = (self._memory.address, self._memory.mapped_nbytes)
        if not self._memory.stable:  # no reference may remain to what is replaced
            self.tensor = self.tensor.new_empty(0)
        try:
            change(nbytes)
        finally:
            if self._memory.address != before[0] and before[1]:
                self.generation += 1
            self.tensor = view_range(self._memory, self._device)
