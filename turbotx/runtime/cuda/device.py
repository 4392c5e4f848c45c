"""A CUDA device: PyTorch's streams and memory, the driver's launches.

In: jobs, launches, calls of PyTorch's ops. Out: the same on the caller's current stream, or
captured as a CUDA graph::

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
    """One NVIDIA GPU of this process. Raises DeviceError where it cannot be used."""

    def __init__(self, torch_device: torch.device, driver: Any = None) -> None:
        require_cuda()
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
        """Return the GPU's name, as the driver has it."""
        return torch.cuda.get_device_name(self.index)

    def active(self) -> AbstractContextManager[object]:
        """Return a context manager that makes the GPU this thread's current device."""
        is_current = torch.cuda.current_device() == self.index
        return _NOTHING if is_current else torch.cuda.device(self.index)

    def load(self, jobs: Sequence[Job]) -> tuple[list[cuda_driver.LoadedKernel], int]:
        """Build what is not on disk in parallel, load what is not on the device."""
        # A process that runs saved programs has no use for what this imports.
        from turbotx.kernels.triton.compiler import build

        compiled = 0
        with self._loading:
            missing = [job for job in jobs if job.digest() not in self._functions]
            found = build(missing, measure=False) if missing else []
            self._add({b.job.digest(): b.binary() for b in found})
            compiled = sum(not b.cached for b in found)
            return [self._functions[job.digest()] for job in jobs], compiled

    def place(self, binaries: Sequence[Binary]) -> list[cuda_driver.LoadedKernel]:
        """Load what is not on the device."""
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
        """Return the current stream's handle; this thread has a context afterwards."""
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
        """Let PyTorch queue something on the current stream."""
        step()

    def recorder(self) -> CudaRecorder:
        """Return a recorder with a stream and a memory pool of its own."""
        return CudaRecorder(self.torch_device)

    def is_capturing(self) -> bool:
        """Return whether the current stream is being captured."""
        return torch.cuda.is_current_stream_capturing()

    def wait(self) -> None:
        """Block until what is queued on the current stream is done."""
        torch.cuda.current_stream(self.index).synchronize()

    def retain(self, tensors: Sequence[torch.Tensor]) -> None:
        """Record the current stream as a user of the tensors' memory."""
        stream = torch.cuda.current_stream(self.index)
        for tensor in tensors:
            tensor.record_stream(stream)

    def new_status(self, count: int) -> torch.Tensor:
        """Return zeroed int32 in pinned memory."""
        # Pinned memory has one address for host and device; only a failed check writes to it.
        return torch.zeros(count, dtype=torch.int32, pin_memory=True)

    def clock(self) -> torch.cuda.Event:
        """Return an event recorded on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> int:
        """Return nanoseconds between two events; blocks until the second has passed."""
        # The driver's answer is a float32 of milliseconds: exact for what lies close together, but
        # a step of 31 us five minutes apart. So times are never counted from a common origin.
        end.synchronize()
        return round(begin.elapsed_time(end) * 1e6)


class CudaRecorder:
    """Captures graphs on a stream of its own, their temporary memory in one pool."""

    def __init__(self, torch_device: torch.device) -> None:
        self._device = torch_device
        self._stream = torch.cuda.Stream(torch_device)
        self._pool: Any = None
        self._anchor: torch.cuda.CUDAGraph | None = None

    def capture(self, body: Callable[[], object]) -> Graph:
        """Return what `body` queues as a graph; the current stream is not captured."""
        current = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        # One at a time, also because PyTorch's pools and caches are shared.
        with capture_lock, pause_gc():
            self._stream.wait_stream(current)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            with torch.cuda.stream(self._stream):
                # A thread's first call of cuBLAS makes its handle, which allocates and waits.
                torch.cuda.current_blas_handle()
                # cuBLAS keeps a workspace for each stream: made anew inside the capture, it lies in
                # the graphs' own pool, which clearing PyTorch's cache leaves alone.
                torch._C._cuda_clearCublasWorkspaces()
                try:
                    # Other threads may go on calling CUDA meanwhile.
                    graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                    body()
                    graph.capture_end()
                except BaseException:
                    self._abandon(graph)
                    raise
            torch._C._cuda_clearCublasWorkspaces()
            current.wait_stream(self._stream)
        # A pool must not lose its last graph: PyTorch forgets it then.
        self._anchor = self._anchor or graph
        return graph

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed, so that its stream and PyTorch can be used again."""
        with suppress(RuntimeError):
            graph.capture_end()
        if self._ends_allocation():
            # PyTorch does not tell its host allocator either, which goes on asking this graph.
            _unfinished.append(graph)
            self._end_generators()
        torch._C._cuda_clearCublasWorkspaces()
        # Graphs captured before keep the old pool.
        self._pool = self._anchor = None

    def _ends_allocation(self) -> bool:
        """Tell PyTorch's allocator that the capture is over, where `capture_end` did not.

        It raises as soon as the device calls the capture invalid. The allocator would then take
        every later capture for a second one into the pool, and hold back what others free.
        """
        try:
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        except RuntimeError:  # it has been told
            return False
        torch._C._cuda_releasePool(self._device.index, self._pool)
        return True

    def _end_generators(self) -> None:
        """Capture nothing: PyTorch 2.11 tells its random generators of a capture's end only where
        it ends well, and takes every later random number for one inside of a capture."""
        empty = torch.cuda.CUDAGraph()
        with suppress(RuntimeError), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            empty.capture_begin(capture_error_mode="thread_local")
            empty.capture_end()


_NOTHING = nullcontext()
# Graphs whose capture the device broke off.
_unfinished: list[torch.cuda.CUDAGraph] = []


def require_cuda() -> None:
    """Raise DeviceError, saying what to do, where no program can run on a GPU."""
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


def require_triton() -> None:
    """Raise DeviceError, saying what to do, where no kernels can be compiled."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise DeviceError(
            "programs on a GPU need Triton: pip install triton (it is part of PyTorch's CUDA "
            "wheels on Linux)"
        ) from error
