"""A CUDA device: kernel launches through the driver, on PyTorch's streams and memory.

In: jobs, launches, calls of PyTorch's ops. Out: they are queued on the current stream or captured
as a CUDA graph::

    device = CudaDevice(torch.device("cuda:0"))
    with device.active(): device.launch(function, grid, addresses, device.stream())
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch

from turbotx.errors import DeviceError
from turbotx.kernels.job import Binary, Job
from turbotx.memory.arena import current_handle
from turbotx.memory.capture_lock import capture_lock
from turbotx.runtime.cuda import driver as cuda_driver
from turbotx.runtime.device import Graph, Grid
from turbotx.runtime.gc_pause import pause_gc


class CudaDevice:
    """One NVIDIA GPU. Raises DeviceError if it cannot be used."""

    def __init__(self, torch_device: torch.device, driver: Any = None) -> None:
        require_cuda(torch_device)
        index = torch_device.index
        self.index: int = torch.cuda.current_device() if index is None else index
        self.torch_device = torch.device("cuda", self.index)
        major, minor = torch.cuda.get_device_capability(self.index)
        if major < 8:
            raise DeviceError(
                f"{self.describe()} has compute capability {major}.{minor}; turbotx's kernels need "
                "8.0 (Ampere) or newer: run the model without turbotx on it"
            )
        self.target = f"sm_{major}{minor}"
        self._driver = driver or cuda_driver.open_driver()
        self._functions: dict[str, cuda_driver.LoadedKernel] = {}
        self._loading = threading.Lock()

    def describe(self) -> str:
        """Return the GPU's name as reported by the driver."""
        return torch.cuda.get_device_name(self.index)

    def active(self) -> AbstractContextManager[object]:
        """Return a context manager that makes the GPU this thread's current device."""
        is_current = torch.cuda.current_device() == self.index
        return _NOTHING if is_current else torch.cuda.device(self.index)

    def load(self, jobs: Sequence[Job]) -> tuple[list[cuda_driver.LoadedKernel], int]:
        """Build uncached jobs in parallel, load kernels that are not loaded yet.

        Returns their handles, in order, and the number of builds."""
        # A lazy import: saved programs run without Triton.
        from turbotx.kernels.triton.compiler import build

        compiled = 0
        with self._loading:
            missing = [job for job in jobs if job.digest() not in self._functions]
            found = build(missing, measure=False) if missing else []
            self._add({b.job.digest(): b.binary() for b in found})
            compiled = sum(not b.cached for b in found)
            return [self._functions[job.digest()] for job in jobs], compiled

    def place(self, binaries: Sequence[Binary]) -> list[cuda_driver.LoadedKernel]:
        """Load binaries that are not loaded yet; return their handles, in order."""
        with self._loading:
            self._add({b.digest: b for b in binaries if b.digest not in self._functions})
            return [self._functions[b.digest] for b in binaries]

    def _add(self, binaries: Mapping[str, Binary]) -> None:
        if not binaries:
            return
        with self.active():
            torch.cuda.init()
            cuda_driver.ensure_context(self._driver, self.index)
            properties: Any = torch.cuda.get_device_properties(self.index)
            limit = properties.shared_memory_per_block_optin
            for digest, binary in binaries.items():
                function = cuda_driver.load_function(self._driver, binary, limit)
                self._functions[digest] = function

    def stream(self) -> int:
        """Return the current stream's handle; makes the device's context current in this thread."""
        cuda_driver.ensure_context(self._driver, self.index)
        return current_handle(self.torch_device)

    def launch(
        self, function: cuda_driver.LoadedKernel, grid: Grid, addresses: Any, stream: int,
        dependent: bool = False,
    ) -> None:  # fmt: skip
        """Queue a kernel with cuLaunchKernel; dependent: by programmatic dependent launch."""
        launch = cuda_driver.launch_dependent if dependent else cuda_driver.launch
        launch(self._driver, function, grid, addresses, stream)

    def call(self, step: Callable[[], object]) -> None:
        """Run a PyTorch call, which queues work on the current stream."""
        step()

    def recorder(self) -> CudaRecorder:
        """Return a recorder with a stream and a memory pool of its own."""
        return CudaRecorder(self.torch_device)

    def is_capturing(self) -> bool:
        """Return whether the current stream is being captured."""
        return torch.cuda.is_current_stream_capturing()

    def wait(self) -> None:
        """Block until the current stream is idle."""
        torch.cuda.current_stream(self.index).synchronize()

    def retain(self, tensors: Sequence[torch.Tensor]) -> None:
        """Record the current stream as a user of the tensors' memory."""
        stream = torch.cuda.current_stream(self.index)
        for tensor in tensors:
            tensor.record_stream(stream)

    def new_status(self, count: int) -> torch.Tensor:
        """Return zeroed int32 in pinned memory."""
        # Pinned memory has the same address on host and device; only failed checks write to it.
        return torch.zeros(count, dtype=torch.int32, pin_memory=True)

    def clock(self) -> torch.cuda.Event:
        """Return an event recorded on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> int:
        """Return nanoseconds between two events; blocks until the second has passed."""
        # The driver returns milliseconds as float32, whose resolution is 31 us for five minutes:
        # only measure between events that are close in time.
        end.synchronize()
        return round(begin.elapsed_time(end) * 1e6)


class CudaRecorder:
    """Captures graphs on its own stream, with temporary memory from one pool."""

    def __init__(self, torch_device: torch.device) -> None:
        self._device = torch_device
        self._stream = torch.cuda.Stream(torch_device)
        self._pool: Any = None
        self._anchor: torch.cuda.CUDAGraph | None = None

    def capture(self, body: Callable[[], object]) -> Graph:
        """Return a graph of the work that `body` queues; the current stream is not affected."""
        current = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        # One capture at a time: PyTorch's pools and caches are shared.
        with capture_lock, pause_gc():
            self._stream.wait_stream(current)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            with torch.cuda.stream(self._stream):
                # A thread's first cuBLAS call creates its handle, which allocates and synchronizes.
                torch.cuda.current_blas_handle()
                # cuBLAS keeps a workspace per stream. Created inside the capture, it is allocated
                # from the graphs' pool and survives clearing PyTorch's cache.
                torch._C._cuda_clearCublasWorkspaces()
                try:
                    # Other threads may call CUDA during the capture.
                    graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                    body()
                    graph.capture_end()
                except BaseException:
                    self._abandon(graph)
                    raise
            torch._C._cuda_clearCublasWorkspaces()
            current.wait_stream(self._stream)
        # PyTorch releases a pool with its last graph: keep one.
        self._anchor = self._anchor or graph
        return graph

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a failed capture, so that the stream and PyTorch's allocator can be used again."""
        with suppress(RuntimeError):
            graph.capture_end()
        if self._ends_allocation():
            # PyTorch does not notify its host allocator either, which still refers to this graph.
            _unfinished.append(graph)
            self._end_generators()
        torch._C._cuda_clearCublasWorkspaces()
        # Earlier graphs keep the old pool.
        self._pool = self._anchor = None

    def _ends_allocation(self) -> bool:
        """End the capture in PyTorch's allocator if `capture_end` did not; return whether it was
        done.

        `capture_end` raises if the driver reports an invalid capture. The allocator would then
        treat later captures as nested ones in the same pool, and defer other threads' frees.
        """
        try:
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        except RuntimeError:  # already ended
            return False
        torch._C._cuda_releasePool(self._device.index, self._pool)
        return True

    def _end_generators(self) -> None:
        """Capture an empty graph: PyTorch 2.11 resets its random generators only after a successful
        capture, and otherwise treats every later random op as captured."""
        empty = torch.cuda.CUDAGraph()
        with suppress(RuntimeError), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            empty.capture_begin(capture_error_mode="thread_local")
            empty.capture_end()


_NOTHING = nullcontext()
# Graphs of invalidated captures.
_unfinished: list[torch.cuda.CUDAGraph] = []


def require_cuda(place: torch.device | None = None) -> None:
    """Raise DeviceError with a remedy if no program can run on a GPU, or on the one given."""
    if torch.version.hip is not None:
        raise DeviceError(
            "this PyTorch is built for ROCm, and turbotx runs programs on NVIDIA GPUs and CPUs: "
            "kernels for gfx942 can be built with `turbotx compile --target gfx942`"
        )
    if not torch.cuda.is_available():
        built = torch.version.cuda
        raise DeviceError(
            "PyTorch sees no CUDA device: "
            + (
                "check `nvidia-smi`, the driver and CUDA_VISIBLE_DEVICES"
                if built
                else "it is a CPU build; install one with CUDA, see pytorch.org"
            )
        )
    count = torch.cuda.device_count()
    if place is not None and (place.index or 0) >= count:
        raise DeviceError(f"there is no {place}: PyTorch sees {count} GPUs, the first is cuda:0")


def require_triton() -> None:
    """Raise DeviceError with a remedy if Triton is not installed."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise DeviceError(
            "programs on a GPU need Triton: pip install triton (it is part of PyTorch's CUDA "
            "wheels on Linux)"
        ) from error
