"""The engine room: starts one process an engine and lets them take turns.

In: engines, a model, inputs on disk. Out: medians and spreads in milliseconds, one engine running
at a time, rounds interleaved, and how much of the machine others used meanwhile::

    with Room(("turbotx", "eager"), source, threads=2) as room:
        room.measure("inputs.pt", rounds=5)  ->  {"turbotx": Spread(median_ms=4.1, ...), ...}
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from turbotx.cli.models import Source
from turbotx.report.machine import processor_name


@dataclass(frozen=True)
class Spread:
    """Milliseconds of `runs` calls: their median, and the tenths at both ends."""

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int


class EngineFailed(Exception):
    """An engine's process said why it cannot go on, or ended."""


class Worker:
    """One engine's process."""

    def __init__(self, engine: str, source: Source, threads: int) -> None:
        given = {
            "engine": engine, "model": source.text, "dtype": source.dtype,
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
        """Wait until the engine is made; raise EngineFailed with its reason."""
        self.ready_s = self._read()["ready_s"]

    def ask(self, inputs: Path, count: int, warm: int) -> list[float]:
        """Return the milliseconds of up to `count` calls; raise EngineFailed."""
        assert self.process.stdin is not None
        try:
            request = {"inputs": str(inputs), "count": count, "warm": warm}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise EngineFailed("its process ended") from error
        times: list[float] = self._read()["times_ms"]
        return times

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
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


class Room:
    """Workers by engine; `failed` says why an engine is not among them."""

    def __init__(self, engines: Sequence[str], source: Source, threads: int) -> None:
        self.failed: dict[str, str] = {}
        self.workers: dict[str, Worker] = {}
        for engine in engines:  # one after another: making an engine uses every core
            self.workers[engine] = Worker(engine, source, threads)
            self._guard(engine, self.workers[engine].wait_ready)

    def __enter__(self) -> Room:
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
            return []

    def measure(self, inputs: Path, rounds: int, count: int = 8) -> dict[str, Spread]:
        """Let every engine run up to `count` calls in each of `rounds` rounds."""
        times: dict[str, list[float]] = {engine: [] for engine in self.workers}
        for k in range(rounds):
            for engine in list(self.workers):
                worker = self.workers[engine]
                times[engine] += self._guard(
                    engine, lambda w=worker, k=k: w.ask(inputs, count, 0 if k else 3)
                )
        return {engine: summarize(t) for engine, t in times.items() if engine in self.workers}

    def busy_s(self) -> tuple[float, float]:
        """CPU seconds spent so far by this machine, and by the workers; zeros off Linux."""
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
"""What others may use of the machine while times are taken that are to be trusted."""


class OthersUse:
    """How many cores other processes used while the block ran."""

    def __init__(self, room: Room) -> None:
        self.room, self.cores = room, 0.0

    def __enter__(self) -> OthersUse:
        self._start, self._before = time.perf_counter(), self.room.busy_s()
        return self

    def __exit__(self, *error: object) -> None:
        after, wall = self.room.busy_s(), time.perf_counter() - self._start
        spent = (after[0] - self._before[0]) - (after[1] - self._before[1])
        self.cores = round(max(0.0, spent / wall), 2)


def summarize(times: Sequence[float]) -> Spread:
    ordered = sorted(times)
    tenth = len(ordered) // 10
    low, high = round(ordered[tenth], 4), round(ordered[-1 - tenth], 4)
    return Spread(round(statistics.median(ordered), 4), low, high, len(ordered))


def describe_machine(threads: int) -> dict[str, Any]:
    """Return the device's name, the threads and the versions that a result depends on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"device": processor_name(), "threads": threads, "versions": versions}
