"""Device: the interface between a GPU program and its device.

In: compiled kernels, grids, arrays of argument addresses. Out: work queued on the caller's stream.
`runtime.cuda.device.CudaDevice` is the real one; tests have others, which record or interpret::

    function = device.load([job])[0]
    device.launch(function, (40, 1, 1), addresses, device.stream())   # asynchronous
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from turbotx.kernels.job import Binary, Job

Grid = tuple[int, int, int]


class Graph(Protocol):
    """Captured launches, with the addresses at the time of capture."""

    def replay(self) -> None:
        """Queue all of them on the current stream."""


class GraphRecorder(Protocol):
    """Captures graphs that are replayed one after another, never concurrently."""

    def capture(self, body: Callable[[], object]) -> Graph:
        """Return a graph of what `body` queues; nothing is executed."""


class Device(Protocol):
    """One GPU, as needed by a program. All calls except loading kernels are made inside `active()`.

    torch_device: the device of its tensors.
    target: the compilation target, such as "sm_90".
    """

    torch_device: torch.device
    target: str

    def active(self) -> AbstractContextManager[object]:
        """Return a context manager that makes it this thread's current device."""

    def load(self, jobs: Sequence[Job]) -> tuple[list[Any], int]:
        """Build and load kernels; return their handles, and how many had to be compiled."""

    def place(self, binaries: Sequence[Binary]) -> list[Any]:
        """Load compiled kernels; return their handles."""

    def stream(self) -> Any:
        """Return the caller's current stream, ready for launches from this thread."""

    def launch(
        self, function: Any, grid: Grid, addresses: Any, stream: Any, dependent: bool = False
    ) -> None:
        """Queue a kernel; `addresses` point to its arguments, which are read before this returns.

        dependent: the kernel itself waits for the preceding one, and may start earlier.
        """

    def call(self, step: Callable[[], object]) -> None:
        """Run a step that queues work through PyTorch."""

    def recorder(self) -> GraphRecorder:
        """Return a recorder of graphs for one arena."""

    def is_capturing(self) -> bool:
        """Return whether the caller is capturing its own graph on the current stream."""

    def wait(self) -> None:
        """Wait until the work queued on the current stream is done."""

    def retain(self, tensors: Sequence[torch.Tensor]) -> None:
        """Record the current stream as a user of tensors: their memory, once freed, is not reused
        before the work queued so far is done."""

    def new_status(self, count: int) -> torch.Tensor:
        """Return zeroed int32 host memory that kernels can write to."""

    def clock(self) -> Any:
        """Return an event recorded on the current stream, for `elapsed`."""

    def elapsed(self, begin: Any, end: Any) -> int:
        """Return the nanoseconds between two events, after waiting for both."""

    def describe(self) -> str:
        """Return the device's name."""
