"""Tune: times candidate schedules of a program's kernels on its device with a call's own data.

In: a GPU program, tensors, a timer. Out: for each kernel and length, the fastest schedule found and
its time::

    tune_program(program, dims, tensors, time_launches)  ->  [TuningResult("fused_add_0", ...)]

If norms can be folded there are two programs, which are timed as a whole (`tune_norms`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from turbotx.engine.compiled import Compiled
from turbotx.errors import TurbotxError
from turbotx.kernels.schedule_selector import FOLDED, STORED
from turbotx.kernels.tuned import GAIN, search
from turbotx.runtime.binding import Binding
from turbotx.runtime.cuda.cuda_graphs import CudaGraphProgram
from turbotx.runtime.cuda.experts import RouteFamily
from turbotx.runtime.cuda.parts import Part
from turbotx.runtime.cuda.runtime import CudaRuntime
from turbotx.runtime.cuda.variants import SequenceFamily
from turbotx.runtime.cuda.weight_copies import WeightCopies
from turbotx.runtime.device import Device

# Minimum number of launches in the timed graph, and number of its replays.
REPEAT, REPLAYS = 50, 5


@dataclass(frozen=True)
class TuningResult:
    """One kernel at one length: its previous and its fastest schedule, in microseconds per launch.

    length: of the kernel's rows; for a GEMM, the number of tokens.
    bucket: the lengths for which the schedule is kept. A GEMM's schedule may be "cublas". For norms
    it is "folded" or "stored", and times are of all launches.
    """

    kernel: str
    digest: str
    length: int
    bucket: str
    before: str
    best: str
    before_us: float
    best_us: float
    tried: int


Timer = Callable[[Device, Callable[[], None], int], float]


def time_launches(device: Device, launch: Callable[[], None], repeat: int = REPEAT) -> float:
    """Return microseconds per launch of `repeat` launches in a CUDA graph: the minimum of several
    replays."""

    def body() -> None:
        for _ in range(repeat):
            launch()

    graph = device.recorder().capture(body)
    graph.replay()
    taken = []
    for _ in range(REPLAYS):
        begin = device.clock()
        graph.replay()
        end = device.clock()
        taken.append(device.elapsed(begin, end) / 1e3 / repeat)
    return min(taken)


@dataclass(frozen=True)
class _Tunable:
    """A family of kernels, a launch that uses it, and the start of the search."""

    family: Any
    launch: int
    length: int
    start: Any

    @property
    def key(self) -> tuple[str, str]:
        return self.family.structure(), self.family.bucket(self.length)

    def step(self, schedule: Any) -> Sequence[Any]:
        return self.family.neighbours(schedule, self.length)


def tune_program(
    program: CudaGraphProgram, dims: tuple[int, ...], tensors: Sequence[torch.Tensor],
    timer: Timer = time_launches,
) -> list[TuningResult]:  # fmt: skip
    """Time every kernel and GEMM of a program at one shape; not thread-safe."""
    runtime, binding = program.runtime, program.bind(dims)
    assert isinstance(runtime, CudaRuntime)
    tunables: dict[tuple[str, str], _Tunable] = {}
    for i, family in runtime.families.items():
        if isinstance(family, (RouteFamily, SequenceFamily)):
            continue  # one schedule, over few bytes
        one = _Tunable(family, i, *family.chosen(binding.sizes))
        if one.key[0]:
            tunables.setdefault(one.key, one)
    found = []
    with torch.no_grad(), runtime.device.active(), program.used(binding, tensors) as run:
        first = ((t.family, [t.start, *t.step(t.start)]) for t in tunables.values())
        _build(runtime, (f.at(s, binding.sizes) for f, schedules in first for s in schedules))
        for tunable in tunables.values():
            with WeightCopies(runtime, tunable.launch, *run, binding.sizes) as copies:
                found.append(_tune_one(runtime, binding, tunable, copies, timer))
    return found


def _tune_one(
    runtime: CudaRuntime, binding: Binding, tunable: _Tunable, copies: WeightCopies, timer: Timer
) -> TuningResult:
    """Search one family's schedules, with weights that are not in the cache."""
    family = tunable.family

    def measure(schedules: Sequence[Any]) -> list[float]:
        candidates = [family.at(s, binding.sizes) for s in schedules]
        _build(runtime, candidates)
        return [_time(runtime, tunable.launch, parts, copies, timer) for parts in candidates]

    best, times = search(tunable.start, tunable.step, measure)
    return TuningResult(
        family.name, tunable.key[0], tunable.length, tunable.key[1], family.tag(tunable.start),
        family.tag(best), times[tunable.start], times[best], len(times),
    )  # fmt: skip


def _build(runtime: CudaRuntime, candidates: Iterable[Sequence[Part]]) -> None:
    """Build and load candidate kernels in parallel; `_time` handles those that fail."""
    with suppress(TurbotxError):
        runtime.load([p.job for parts in candidates for p in parts if p.job is not None])


def tune_call(
    compiled: Compiled, dims: tuple[int, ...], tensors: Sequence[torch.Tensor],
    timer: Timer = time_launches,
) -> list[TuningResult]:  # fmt: skip
    """Time every kernel and GEMM of a call at one shape, with norms folded and stored."""
    found: dict[tuple[str, str], TuningResult] = {}
    for program in compiled.programs:
        assert isinstance(program, CudaGraphProgram)
        for f in tune_program(program, dims, tensors, timer):
            found.setdefault((f.digest, f.bucket), f)
    return list(found.values())


def tune_norms(
    compiled: Compiled, dims: tuple[int, ...], tensors: Sequence[torch.Tensor],
    timer: Timer = time_launches,
) -> list[TuningResult]:  # fmt: skip
    """Time a call as a whole at one shape, with norms stored and folded; empty if there is only one
    program. Tune its tiles first."""
    if len(compiled.programs) < 2:
        return []
    times: dict[str, float] = {}
    for tag, program in zip((STORED, FOLDED), compiled.programs, strict=True):
        assert isinstance(program, CudaGraphProgram)
        runtime, binding = program.runtime, program.bind(dims)
        with torch.no_grad(), runtime.device.active(), program.used(binding, tensors) as used:
            table, state = used
            run: Any = partial(runtime.run, table, binding.sizes, state)  # result ignored
            times[tag] = timer(runtime.device, run, REPEAT)
    tokens = compiled.programs[1].token_range
    assert tokens is not None
    before = FOLDED if tokens.holds(dims) else STORED
    other = STORED if before == FOLDED else FOLDED
    best = other if times[other] < times[before] * (1 - GAIN) else before
    bucket = tokens.bucket(dims)
    return [
        TuningResult(
            "norms", tokens.structure, bucket, str(bucket), before, best,
            times[before], times[best], len(times),
        )
    ]  # fmt: skip


def _time(
    runtime: CudaRuntime, i: int, parts: Sequence[Part], copies: WeightCopies, timer: Timer
) -> float:
    """Return the time of one candidate, infinity if the device cannot run it."""

    def launch() -> None:
        runtime.queue(i, parts, copies.table, copies.turn())

    try:
        launch()  # loads it outside of any capture
        copies.restore()
        return timer(runtime.device, launch, max(REPEAT, copies.count))
    except TurbotxError:
        return math.inf
    finally:
        copies.restore()


def gains(found: Sequence[TuningResult]) -> dict[str, dict[str, str]]:
    """Return the schedules worth keeping: those faster than the previous choice."""
    kept: dict[str, dict[str, str]] = {}
    for f in found:
        if f.best != f.before:
            kept.setdefault(f.digest, {})[f.bucket] = f.best
    return kept
