"""Tune: the schedules of a program's kernels, timed on its device with a call's own data.

In: a GPU program, tensors, a timer. Out: for each kernel and length the fastest schedule found, and
what it gains::

    tune_program(program, dims, tensors, time_launches)  ->  [Found("fused_add_layer_norm", ...)]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from turbotx.errors import TurbotxError
from turbotx.graphed import GraphedProgram
from turbotx.kernels.schedule import Schedule, power_above
from turbotx.kernels.tuned import neighbours, search
from turbotx.runtime.cuda_launch import KernelFamily
from turbotx.runtime.device import Device

# Launches inside the graph that is timed, and replays of it.
REPEAT, REPLAYS = 50, 5


@dataclass(frozen=True)
class Found:
    """One kernel at one length: the schedule it had and the fastest, in microseconds a launch."""

    kernel: str
    digest: str
    length: int
    before: Schedule
    best: Schedule
    before_us: float
    best_us: float
    tried: int

    @property
    def bucket(self) -> str:
        return str(power_above(self.length))


Timer = Callable[[Device, Callable[[], None]], float]


def time_launches(device: Device, launch: Callable[[], None]) -> float:
    """Microseconds of one launch among many in a CUDA graph: the least of several replays."""

    def body() -> None:
        for _ in range(REPEAT):
            launch()

    graph = device.recorder().capture(body)
    graph.replay()
    taken = []
    for _ in range(REPLAYS):
        begin = device.clock()
        graph.replay()
        end = device.clock()
        taken.append((end() - begin()) / 1e3 / REPEAT)
    return min(taken)


def tune_program(
    program: GraphedProgram, dims: tuple[int, ...], tensors: Sequence[torch.Tensor],
    timer: Timer = time_launches, progress: Callable[[str], None] = lambda what: None,
) -> list[Found]:  # fmt: skip
    """Time every generated kernel of a program at one shape; nobody else may use it meanwhile."""
    runtime, binding = program.runtime, program.bind(dims)
    found: dict[tuple[str, int], Found] = {}
    with torch.no_grad(), runtime.device.active(), program.used(binding, tensors) as table:
        for i, family in runtime.families.items():
            if not isinstance(family, KernelFamily):
                continue
            length, start = family.chosen(binding.sizes)
            key = (family.kernel.digest(), length)
            if key in found:
                continue
            progress(family.kernel.name)

            def measure(schedules: Sequence[Schedule], i: int = i, family: Any = family) -> Any:
                return [
                    _time(program, i, family, s, binding.sizes, table, timer) for s in schedules
                ]

            def step(schedule: Schedule, family: Any = family, length: int = length) -> Any:
                return neighbours(family.kernel, schedule, length)

            best, times = search(start, step, measure)
            found[key] = Found(
                family.kernel.name, key[0], length, start, best, times[start], times[best],
                len(times),
            )  # fmt: skip
    return list(found.values())


def _time(
    program: GraphedProgram, i: int, family: KernelFamily, schedule: Schedule, sizes: Any,
    table: Any, timer: Timer,
) -> float:  # fmt: skip
    """Return the time of one candidate, infinity where the device cannot run it."""
    runtime = program.runtime
    job, grid = family.at(schedule, sizes)
    try:
        runtime.queue(i, job, grid, table)  # builds and loads it, outside of any capture
        return timer(runtime.device, lambda: runtime.queue(i, job, grid, table))
    except TurbotxError:
        return math.inf
