"""A range of CUDA addresses, reserved as a whole and backed by the driver's virtual memory calls.

In: byte counts. Out: device memory at a fixed address, so that captured CUDA graphs stay valid as
it grows. The driver is a parameter: `cuda.bindings.driver`, or a stand-in::

    memory = CudaRange(0, 1 << 40, driver, torch.cuda.synchronize); memory.map_to(2 << 20)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from turbotx.errors import TurbotxError
from turbotx.memory.capture_lock import capture_lock
from turbotx.memory.cpu_range import MemoryExhausted
from turbotx.memory.planner.plan import align

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


class CudaMemoryError(TurbotxError):
    """The CUDA driver refused a virtual memory call for a reason other than lack of memory."""


class CudaRange:
    """A reserved address range, of which bytes [address, address + mapped_nbytes) are device
    memory.

    Each growth is one allocation, mapped after the last. Shrinking releases whole growths from the
    end; it and the finalizer synchronize the device first. The device's context must be initialised
    and current. Raises MemoryExhausted and CudaMemoryError; the range is then unchanged.
    """

    stable = True

    def __init__(
        self,
        device_index: int,
        address_nbytes: int,
        driver: Any,
        synchronize: Callable[[], object],
    ) -> None:
        self._driver = driver
        self._synchronize = synchronize
        self._property = make_property(driver, device_index)
        flag = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self._granule = int(call(driver, "cuMemGetAllocationGranularity", self._property, flag))
        total_nbytes = int(call(driver, "cuDeviceTotalMem", device_index))
        wish = min(address_nbytes, 2 * total_nbytes)
        self.capacity_nbytes = align(wish, self._granule)
        base = call(driver, "cuMemAddressReserve", self.capacity_nbytes, self._granule, 0, 0)
        self.address = int(base)
        self.mapped_nbytes = 0
        self._growths: list[tuple[int, int, Any]] = []
        """(offset, nbytes, allocation handle), ascending."""
        self._end: list[tuple[int, int, Any]] = []
        """The same of what `make_readable` has mapped."""
        release = partial(
            _release_all, driver, synchronize, self.address, self.capacity_nbytes,
            (self._growths, self._end),
        )  # fmt: skip
        self.close = weakref.finalize(self, capture_lock.when_free, release)
        self.close.atexit = False  # at exit, the driver frees the memory itself

    def map_to(self, nbytes: int) -> None:
        """Back at least the first `nbytes`, with one allocation; never shrinks. Raises
        MemoryExhausted beyond the reserved addresses or the device's memory."""
        wanted = align(nbytes, self._granule) - self.mapped_nbytes
        if wanted <= 0:
            return
        most = self._end[0][0] if self._end else self.capacity_nbytes
        if self.mapped_nbytes + wanted > most:
            raise MemoryExhausted(
                f"an arena of {nbytes} bytes exceeds the {most} bytes of device addresses reserved "
                "for it"
            )
        self._growths.append(self._map(self.mapped_nbytes, wanted))
        self.mapped_nbytes += wanted

    def make_readable(self, nbytes: int) -> None:
        """Back the first and the last `nbytes` for as long as the range exists: who shows a tensor
        over all addresses, as a traceback or a debugger, reads its first and last elements, and an
        address without memory would end the device's context. Raises as `map_to`."""
        self.map_to(nbytes)
        wanted = align(nbytes, self._granule)
        if not self._end and self.mapped_nbytes + wanted <= self.capacity_nbytes:
            self._end.append(self._map(self.capacity_nbytes - wanted, wanted))

    def _map(self, offset: int, wanted: int) -> tuple[int, int, Any]:
        """Back `wanted` bytes from `offset` on with one allocation."""
        start = self.address + offset
        handle = call(self._driver, "cuMemCreate", wanted, self._property, 0)
        try:
            call(self._driver, "cuMemMap", start, wanted, 0, handle, 0)
            try:
                access = make_access(self._driver, self._property)
                call(self._driver, "cuMemSetAccess", start, wanted, [access], 1)
            except TurbotxError:
                call(self._driver, "cuMemUnmap", start, wanted)
                raise
        except TurbotxError:
            call(self._driver, "cuMemRelease", handle)
            raise
        return offset, wanted, handle

    def unmap_to(self, nbytes: int) -> None:
        """Synchronize, then release every growth that lies above the first `nbytes`."""
        if not self._growths or self._growths[-1][0] < nbytes:
            return
        with capture_lock:
            self._synchronize()
            while self._growths and self._growths[-1][0] >= nbytes:
                offset, grown, handle = self._growths.pop()
                self.mapped_nbytes = offset
                call(self._driver, "cuMemUnmap", self.address + offset, grown)
                call(self._driver, "cuMemRelease", handle)


def call(driver: Any, name: str, *arguments: object) -> Any:
    """Call a driver function by name and return its value. Raises MemoryExhausted if the device is
    out of memory, CudaMemoryError for any other error code."""
    code, *values = getattr(driver, name)(*arguments)
    if int(code) == 0:
        return values[0] if values else None
    if int(code) == _OUT_OF_MEMORY:
        raise MemoryExhausted(
            f"the CUDA device is out of memory ({name}); use smaller batches or shorter "
            f"sequences, or free what else holds memory on it"
        )
    raise CudaMemoryError(f"the CUDA driver's {name} failed with {code}")


def make_property(driver: Any, device_index: int) -> Any:
    """Return the driver's CUmemAllocationProp of pinned memory on the device of that index."""
    allocation = driver.CUmemAllocationProp()
    allocation.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    allocation.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    allocation.location.id = device_index
    return allocation


def make_access(driver: Any, allocation: Any) -> Any:
    """Return the driver's CUmemAccessDesc that lets the allocation's own device read and write."""
    access = driver.CUmemAccessDesc()
    access.location = allocation.location
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return access


def _release_all(
    driver: Any,
    synchronize: Callable[[], object],
    address: int,
    capacity_nbytes: int,
    mapped: tuple[list[tuple[int, int, Any]], ...],
) -> None:
    synchronize()
    for growths in mapped:
        while growths:
            offset, grown, handle = growths.pop()
            call(driver, "cuMemUnmap", address + offset, grown)
            call(driver, "cuMemRelease", handle)
    call(driver, "cuMemAddressFree", address, capacity_nbytes)
