"""A dry run of `gpu.py` without a GPU: every line runs, and kernels are only collected.

In: nothing; `start()` puts stand-ins in the place of PyTorch's CUDA and of turbotx's device. Out:
the jobs of all kernels that the device would have loaded, to be built beforehand::

    device = start("sm_90"); ...; build(device.jobs.values())

Launches do nothing and every result is garbage: a dry run tells that the scripts run, not more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from turbotx.kernels.job import Job
from turbotx.runtime.cuda.absent_device import AbsentDevice


class StandIn(AbsentDevice):
    """An absent device that lets a program run, and remembers what it was asked to load."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.jobs: dict[str, Job] = {}

    def load(self, jobs: Sequence[Job]) -> tuple[list[Any], int]:
        new = {j.digest(): j for j in jobs if j.digest() not in self.jobs}
        self.jobs.update(new)
        return list(jobs), len(new)

    def launch(self, *args: Any, **options: Any) -> None:
        pass

    def call(self, step: Callable[[], object]) -> None:
        step()

    def stream(self) -> Any:
        return 0

    def recorder(self) -> Any:
        return self

    def capture(self, body: Callable[[], object]) -> Graph:
        body()
        return Graph()

    def clock(self) -> Any:
        return 0

    def elapsed(self, begin: Any, end: Any) -> Any:
        return 1


class Event:
    """torch.cuda.Event by the host's clock."""

    def __init__(self, **options: Any) -> None:
        self.at = 0.0

    def record(self, *args: Any) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1e3 + 1e-3


class Graph:
    """torch.cuda.CUDAGraph, of nothing."""

    def replay(self) -> None:
        pass


class Stream:
    """torch.cuda.Stream, on which nothing is queued."""

    def __init__(self, *args: Any) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass


@contextmanager
def _nothing(*args: Any, **options: Any) -> Iterator[None]:
    yield


def start(target: str) -> StandIn:
    """Put stand-ins in place for the rest of the process."""
    import turbotx.engine.engine

    device = StandIn(target)
    turbotx.engine.engine.open_device = lambda place, backend: device  # type: ignore[assignment]
    stand_ins: dict[str, Any] = {
        "Event": Event, "synchronize": lambda *a: None, "Stream": Stream,
        "stream": _nothing, "current_stream": Stream, "CUDAGraph": Graph,
        "graph": _nothing, "empty_cache": lambda: None, "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0, "max_memory_allocated": lambda: 0,
        "memory_stats": lambda: {"num_device_alloc": 0},
    }  # fmt: skip
    for name, value in stand_ins.items():
        setattr(torch.cuda, name, value)
    return device
