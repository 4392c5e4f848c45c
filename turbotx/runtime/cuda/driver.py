"""CUDA driver calls that load and launch kernels, through ctypes.

In: cubins. Out: loaded functions, each launched by one driver call, without Triton's Python
launcher and independent of Triton's version::

    function = load_function(driver, binary, limit)
    launch(driver, function, (40, 1, 1), addresses, stream)
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from turbotx.errors import BuildError, DeviceError
from turbotx.kernels.job import Binary

# Shared memory that a kernel may use without setting an attribute.
PLAIN_SHARED_NBYTES = 48 * 1024
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
# CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, in percent of a multiprocessor's maximum.
_SHARED_CARVEOUT, _MOST_SHARED = 9, 100


_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: an id and a 64-byte value."""

    _fields_ = (
        ("id", ctypes.c_uint), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )  # fmt: skip


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("count", ctypes.c_uint),
    )  # fmt: skip


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel loaded on the device, and its binary."""

    binary: Binary
    handle: int


def open_driver() -> Any:
    """Return libcuda; raise DeviceError if it cannot be loaded."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DeviceError(
            f"the CUDA driver's libcuda.so.1 cannot be loaded ({error}): install NVIDIA's driver"
        ) from error
    library.cuLaunchKernel.argtypes = [
        ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip
    return library


def check(driver: Any, code: int, what: str) -> None:
    """Raise DeviceError with the driver's error text if `code` is not 0."""
    if code == 0:
        return
    text = ctypes.c_char_p()
    driver.cuGetErrorString(code, ctypes.byref(text))
    words = text.value.decode() if text.value else "unknown error"
    raise DeviceError(f"CUDA error {code} ({words}) in {what}")


def ensure_context(driver: Any, index: int) -> None:
    """Make the device's primary context current in this thread if none is."""
    current = ctypes.c_void_p()
    check(driver, driver.cuCtxGetCurrent(ctypes.byref(current)), "cuCtxGetCurrent")
    if current.value:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    check(driver, driver.cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
    retained = driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    check(driver, retained, "cuDevicePrimaryCtxRetain")
    check(driver, driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")


def load_function(driver: Any, binary: Binary, limit_nbytes: int) -> LoadedKernel:
    """Load a cubin into the current context, for the life of the process.

    limit_nbytes: the device's shared memory per block. Raises BuildError if the kernel needs more.
    """
    name, shared_nbytes = binary.name, binary.shared_nbytes
    if shared_nbytes > limit_nbytes:
        raise BuildError(
            f"{name} needs {shared_nbytes} bytes of shared memory and the device has "
            f"{limit_nbytes} for a program: choose smaller tiles for it (option schedules)"
        )
    module, handle = ctypes.c_void_p(), ctypes.c_void_p()
    check(driver, driver.cuModuleLoadData(ctypes.byref(module), binary.image), f"loading {name}")
    found = driver.cuModuleGetFunction(ctypes.byref(handle), module, binary.entry.encode())
    check(driver, found, f"looking for {binary.entry}")
    if shared_nbytes > PLAIN_SHARED_NBYTES:
        asked = driver.cuFuncSetAttribute(handle, _MAX_DYNAMIC_SHARED, shared_nbytes)
        check(driver, asked, f"asking for {shared_nbytes} bytes of shared memory for {name}")
    # L1 and shared memory are one memory, repartitioned only while a multiprocessor is idle: with
    # the same preference for all kernels they can overlap.
    asked = driver.cuFuncSetAttribute(handle, _SHARED_CARVEOUT, _MOST_SHARED)
    check(driver, asked, f"asking for shared memory rather than cache for {name}")
    assert handle.value is not None
    return LoadedKernel(binary, handle.value)


def launch(
    driver: Any, function: LoadedKernel, grid: tuple[int, int, int], addresses: Any, stream: int
) -> None:
    """Queue a kernel on a stream; addresses: array of pointers to its arguments."""
    code = driver.cuLaunchKernel(
        function.handle, *grid, function.binary.threads, 1, 1, function.binary.shared_nbytes,
        stream, addresses, None,
    )  # fmt: skip
    if code:
        check(driver, code, f"launching {function.binary.name} on a grid of {grid}")


def launch_dependent(
    driver: Any, function: LoadedKernel, grid: tuple[int, int, int], addresses: Any, stream: int
) -> None:
    """Queue a kernel by programmatic dependent launch: it may start before the previous one ends.

    The kernel itself waits for the previous one's results (`kernels.dependent`).
    """
    attribute = LaunchAttribute(_PROGRAMMATIC_SERIALIZATION, b"", 1)
    config = LaunchConfig(
        grid, (function.binary.threads, 1, 1), function.binary.shared_nbytes, stream,
        ctypes.pointer(attribute), 1,
    )  # fmt: skip
    code = driver.cuLaunchKernelEx(
        ctypes.byref(config), ctypes.c_void_p(function.handle), addresses, None
    )
    if code:
        check(driver, code, f"launching {function.binary.name} on a grid of {grid}")
