"""Runner: starts one process per engine and alternates between them.

In: engines, a model, inputs on disk. Out: medians and spreads in milliseconds, with one engine
running at a time, rounds interleaved, and the CPU use of other processes meanwhile::

    with Runner(("turbotx", "eager"), source, threads=2) as runner:
        runner.measure("inputs.pt", rounds=5)  ->  {"turbotx": Spread(median_ms=4.1, ...), ...}
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbotx.cli.models import Source
from turbotx.errors import versions
from turbotx.kernels.processor import processor_name


@dataclass(frozen=True)
class CallPattern:
    """How engines are called: `rounds` turns of up to `calls` calls, by `streams` threads at once,
    after `warmup` uncounted calls. threads: of PyTorch, None for its default."""

    rounds: int = 5
    threads: int | None = None
    warmup: int = 3
    calls: int = 8
    streams: int = 1


@dataclass(frozen=True)
class Spread:
    """Milliseconds of `runs` calls: median, 10th, 90th, 95th and 99th percentiles; and calls per
    second of all streams together."""

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    p95_ms: float
    p99_ms: float
    calls_per_s: float


@dataclass(frozen=True)
class Turn:
    """The calls of one turn: milliseconds of each, and the elapsed time of all."""

    times_ms: Sequence[float]
    wall_ms: float


class EngineFailed(Exception):
    """An engine's process reported an error or ended."""


class Worker:
    """One engine's process."""

    def __init__(self, engine: str, source: Source, threads: int) -> None:
        given = {
            "engine": engine, "model": source.text, "dtype": source.dtype,
            "quantize": source.quantize,
            "weights": str(source.weights) if source.weights else "", "threads": threads,
        }  # fmt: skip
        command = [sys.executable, "-m", "turbotx.cli.bench.worker", json.dumps(given)]
        settings = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=settings,
        )  # fmt: skip
        self.ready_s: float | None = None

    def wait_ready(self) -> None:
        """Wait until the engine is ready; raise EngineFailed with its reason."""
        self.ready_s = self._read()["ready_s"]

    def ask(self, inputs: Path, count: int, warm: int, streams: int) -> Turn:
        """Return the times of up to `count` calls; raise EngineFailed."""
        assert self.process.stdin is not None
        try:
            request = {"inputs": str(inputs), "count": count, "warm": warm, "streams": streams}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise EngineFailed("its process ended") from error
        found = self._read()
        return Turn(found["times_ms"], found["wall_ms"])

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EngineFailed(f"its process ended with code {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise EngineFailed(found["error"])
        return found

    def stop(self) -> None:
        """Kill the process and close its pipes."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


class Runner:
    """Worker processes by engine; `failed` maps each missing engine to the reason."""

    def __init__(
        self, engines: Sequence[str], source: Source, threads: int,
        tell: Callable[[str], object] = lambda engine: None,
    ) -> None:  # fmt: skip
        """tell: is called with each engine before it is made."""
        self.failed: dict[str, str] = {}
        self.workers: dict[str, Worker] = {}
        for engine in engines:  # sequentially, since making an engine uses all cores
            tell(engine)
            self.workers[engine] = Worker(engine, source, threads)
            self._guard(engine, self.workers[engine].wait_ready)

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers.values():
            worker.stop()

    def _guard(self, engine: str, call: Any) -> Any:
        try:
            return call()
        except EngineFailed as error:
            self.failed[engine] = str(error)
            self.workers.pop(engine).stop()
            return None

    def measure(self, inputs: Path, load: CallPattern) -> dict[str, Spread]:
        """Run every engine once per round; return their times."""
        turns: dict[str, list[Turn]] = {engine: [] for engine in self.workers}
        for k in range(load.rounds):
            for engine in list(self.workers):
                worker, warm = self.workers[engine], 0 if k else load.warmup
                turn = self._guard(
                    engine, lambda w=worker, n=warm: w.ask(inputs, load.calls, n, load.streams)
                )
                turns[engine] += [turn] if turn is not None else []
        return {engine: summarize(t) for engine, t in turns.items() if engine in self.workers}

    def busy_s(self) -> tuple[float, float]:
        """Return the CPU seconds used so far by this machine and by the workers; zeros if not on
        Linux."""
        try:
            fields = Path("/proc/stat").read_text().split()[1:9]
            own = [Path(f"/proc/{w.process.pid}/stat").read_text() for w in self.workers.values()]
        except OSError:
            return 0.0, 0.0
        tick = os.sysconf("SC_CLK_TCK")
        user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields)
        spent = sum(sum(map(int, text.rpartition(")")[2].split()[11:13])) for text in own)
        return (user + nice + system + irq + softirq + steal) / tick, spent / tick


QUIET_CORES = 0.2
"""CPU use of other processes, in cores, above which times are not trusted."""


class OthersUse:
    """Measures how many cores other processes used while the block ran."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.cores = runner, 0.0

    def __enter__(self) -> OthersUse:
        self._start, self._before = time.perf_counter(), self.runner.busy_s()
        return self

    def __exit__(self, *error: object) -> None:
        after, wall = self.runner.busy_s(), time.perf_counter() - self._start
        spent = (after[0] - self._before[0]) - (after[1] - self._before[1])
        self.cores = round(max(0.0, spent / wall), 2)


def summarize(turns: Sequence[Turn]) -> Spread:
    """Return the percentiles and the rate over the calls of all turns."""
    ordered = sorted(t for turn in turns for t in turn.times_ms)
    tenth, last = len(ordered) // 10, len(ordered) - 1
    low, high, p95, p99 = (
        round(ordered[k], 4)
        for k in (tenth, last - tenth, math.ceil(0.95 * last), math.ceil(0.99 * last))
    )
    rate = 1e3 * len(ordered) / sum(turn.wall_ms for turn in turns)
    median = round(statistics.median(ordered), 4)
    return Spread(median, low, high, len(ordered), p95, p99, round(rate, 2))


def describe_machine(threads: int) -> dict[str, Any]:
    """Return the device name, threads and versions on which a result depends."""
    return {"device": processor_name(), "threads": threads, "versions": versions()}
