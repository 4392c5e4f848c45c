"""Profile: how long each launch takes, and what it moves in that time.

In: a compiled call, its launches and one call's inputs. Out: a `Profile`: medians over runs, a
Chrome trace of the median run, and the overhead of measuring::

    report.profile(input_ids=ids, attention_mask=mask).launches[3].median_us
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from turbotx.capture.ambient import read_decisive
from turbotx.capture.arguments import tensors_of
from turbotx.capture.call_key import describe_call
from turbotx.engine.compiled import Compiled
from turbotx.report.amounts import layer_of
from turbotx.report.entries import LaunchEntry
from turbotx.report.replay import dims_of
from turbotx.runtime.binding import Binding
from turbotx.runtime.program import Program

WARM_UP = 3


@dataclass(frozen=True)
class Timed:
    """One launch: its begin and length in the run of median length, and its median over all
    runs."""

    launch: LaunchEntry
    begin_us: float
    length_us: float
    median_us: float

    @property
    def gb_per_s(self) -> float:
        """Compulsory bytes over time: the achieved bandwidth, ignoring caches."""
        nbytes = self.launch.traffic.compulsory_nbytes
        return nbytes / self.median_us / 1e3 if self.median_us else 0.0

    @property
    def gflop_per_s(self) -> float:
        """Billions of operations per second at the median time; 0 if there is no time."""
        return self.launch.traffic.flops / self.median_us / 1e3 if self.median_us else 0.0


@dataclass(frozen=True)
class Profile:
    """The times of a call.

    launches: in execution order.
    total_us: median from the first begin to the last end.
    between_us: median time of a run outside of any launch.
    guards_us: time a call spends on its guards, including those on parameters.
    overhead: what reading the clock around every launch added to the fastest run, as a fraction of
    it.
    """

    launches: tuple[Timed, ...]
    total_us: float
    between_us: float
    runs: int
    overhead: float
    guards_us: float = 0.0

    @property
    def between_launches_us(self) -> float:
        """What one launch costs beyond its own work: addresses, sizes and the call."""
        return self.between_us / len(self.launches) if self.launches else 0.0

    def by(self, key: Callable[[LaunchEntry], str]) -> dict[str, tuple[float, int]]:
        """Return microseconds and count by a key, longest first."""
        found: dict[str, tuple[float, int]] = {}
        for t in self.launches:
            before = found.get(key(t.launch), (0.0, 0))
            found[key(t.launch)] = (before[0] + t.median_us, before[1] + 1)
        return dict(sorted(found.items(), key=lambda item: -item[1][0]))

    def by_region(self) -> dict[str, tuple[float, int]]:
        """Return microseconds and count of every kernel, and of GEMMs by module."""
        return self.by(lambda x: x.kernel or f"{x.name.rstrip('0123456789_')} {x.module}".strip())

    def by_module(self) -> dict[str, tuple[float, int]]:
        """Return microseconds and count of every module, down to its layer."""
        return self.by(lambda x: layer_of(x.module, "(the model itself)"))

    def to_chrome_trace(self) -> dict[str, Any]:
        """Return the trace-event format read by chrome://tracing and Perfetto."""
        events = [
            {
                "name": t.launch.name, "cat": t.launch.kind, "ph": "X", "pid": 1, "tid": 1,
                "ts": t.begin_us, "dur": t.length_us,
                "args": {
                    "module": t.launch.module, "computes": t.launch.source,
                    "bytes": t.launch.traffic.compulsory_nbytes, "GB/s": round(t.gb_per_s, 2),
                    "GFLOP/s": round(t.gflop_per_s, 2),
                },
            }
            for t in self.launches
        ]  # fmt: skip
        return {"traceEvents": events, "displayTimeUnit": "ns"}


def profile(
    compiled: Compiled, launches: Sequence[LaunchEntry],
    args: tuple[Any, ...], kwargs: dict[str, Any], runs: int,
) -> Profile:  # fmt: skip
    """Time every launch over `runs` runs; not thread-safe. Raises InputError for inputs of another
    call."""
    tensors = tensors_of(args, kwargs)
    binding = compiled.program.bind(dims_of(compiled, tensors))
    found = time_program(compiled.program, launches, binding, tensors, runs)
    return replace(found, guards_us=time_guards(compiled, args, kwargs))


def time_program(
    program: Program, launches: Sequence[LaunchEntry], binding: Binding,
    tensors: Sequence[torch.Tensor], runs: int,
) -> Profile:  # fmt: skip
    """Time the launches of a program, without a call's guards."""
    count = len(launches)
    ticks = (ctypes.c_int64 * (2 * count))()
    taken, plain, clocked = [], [], []
    with torch.no_grad():
        for _ in range(WARM_UP):
            program.run(binding, tensors, ticks)
        for _ in range(runs):
            begin = time.perf_counter_ns()
            program.run(binding, tensors)
            middle = time.perf_counter_ns()
            program.run(binding, tensors, ticks)
            clocked.append(time.perf_counter_ns() - middle)
            plain.append(middle - begin)
            taken.append(np.array(ticks, dtype=np.int64).reshape(count, 2))
    return _summarize(launches, np.stack(taken), max(0.0, min(clocked) / min(plain) - 1))


def time_guards(compiled: Compiled, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Return the microseconds of a call's guards, the median of many: `Engine.check` of a known
    call, and `Weights.refresh`."""
    weights = compiled.program.runtime.weights
    known = {describe_call(args, kwargs, read_decisive())[0]: compiled}
    times = []
    with torch.no_grad():
        for _ in range(200):
            begin = time.perf_counter_ns()
            described, tensors = describe_call(args, kwargs, read_decisive())
            if known.get(described) is None:
                raise AssertionError("two traces of one call differ")
            torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
            weights.refresh()
            times.append(time.perf_counter_ns() - begin)
    return float(np.median(times)) / 1e3


def _summarize(launches: Sequence[LaunchEntry], taken: np.ndarray, overhead: float) -> Profile:
    """Summarize runs. taken: nanoseconds, (runs, launches, begin and end)."""
    totals = (taken[:, -1, 1] - taken[:, 0, 0]) / 1e3
    middle = int(np.argsort(totals)[len(totals) // 2])
    begins = (taken[middle, :, 0] - taken[middle, 0, 0]) / 1e3
    lengths = (taken[:, :, 1] - taken[:, :, 0]) / 1e3
    between = np.median(totals - lengths.sum(axis=1))
    medians = np.median(lengths, axis=0).tolist()
    rows = zip(launches, begins.tolist(), lengths[middle].tolist(), medians, strict=True)
    timed = tuple(Timed(*row) for row in rows)
    return Profile(timed, float(np.median(totals)), float(between), len(taken), overhead)
