"""Device: the interface between a GPU program and its device.

In: compiled kernels, grids, arrays of argument addresses. Out: work queued on the caller's stream.
`cuda_device.CudaDevice` is the real one; tests put in devices that record, or that interpret::

    function = device.load([job])[0]
    device.launch(function, (40, 1, 1), addresses, device.stream())   # returns at once
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from turbotx.kernels.job import Binary, Job

Grid = tuple[int, int, int]


class Graph(Protocol):
    """Launches captured once, with the addresses that they had."""

    def replay(self) -> None:
        """Queue all of them on the current stream."""


class GraphRecorder(Protocol):
    """Captures graphs that are replayed one after another, never at the same time."""

    def capture(self, body: Callable[[], object]) -> Graph:
        """Return what `body` would have queued, which did not run."""


class Device(Protocol):
    """One GPU, as far as a program needs it; all calls but those that load kernels are made inside
    `active()`.

    torch_device: where its tensors lie. target: what kernels are compiled for, as "sm_90".
    """

    torch_device: torch.device
    target: str

    def active(self) -> AbstractContextManager[object]:
        """Make it this thread's device for a while."""

    def load(self, jobs: Sequence[Job]) -> tuple[list[Any], int]:
        """Build and load kernels; return their handles, and how many had to be compiled."""

    def place(self, binaries: Sequence[Binary]) -> list[Any]:
        """Load kernels that are compiled already; return their handles."""

    def stream(self) -> Any:
        """Return the caller's current stream, ready for launches by this thread."""

    def launch(
        self, function: Any, grid: Grid, addresses: Any, stream: Any, dependent: bool = False
    ) -> None:
        """Queue a kernel; `addresses` point at its arguments, which are read before returning.

        dependent: it waits by itself for the kernel queued before it, and may start earlier.
        """

    def call(self, step: Callable[[], object]) -> None:
        """Let PyTorch queue something."""

    def recorder(self) -> GraphRecorder:
        """Return something that captures graphs for one arena."""

    def is_capturing(self) -> bool:
        """Return whether the caller is capturing a graph of its own on the current stream."""

    def wait(self) -> None:
        """Return when what is queued on the current stream is done."""

    def retain(self, tensors: Sequence[torch.Tensor]) -> None:
        """Record the current stream as a reader of tensors: their memory, once freed, is not reused
        before what was queued on it by then is done."""

    def new_status(self, count: int) -> torch.Tensor:
        """Return zeroed int32 on the host that kernels may write to."""

    def clock(self) -> Any:
        """Return a mark of this moment on the current stream, for `elapsed`."""

    def elapsed(self, begin: Any, end: Any) -> int:
        """Return the nanoseconds between two marks, once the device has passed both."""

    def describe(self) -> str:
        """Return the device's name."""
