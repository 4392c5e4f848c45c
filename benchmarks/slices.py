"""A long benchmark in slices: what has been measured is kept, the next run goes on.

In: a JSON file, the parameters, how long this run may start new measurements, and how
much disturbance is too much. Out: each named
measurement, read back or taken now; ``Later`` once the time is spent::

    slices = Slices(Path("found.json"), {"count": 400}, 240.0, redo_cores=0.3)
    row = slices.measure("fifo at 0.8", lambda: {"p99_ms": 12.5})
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch

from turbotx.kernels.processor import processor_name


class Later(Exception):
    """The time of this run is spent: what is missing is for the next one."""


class Slices:
    """Named measurements of one experiment, written after each of them."""

    def __init__(
        self, path: Path, parameters: dict[str, Any], seconds: float, redo_cores: float
    ) -> None:
        self.path = path
        self.until = time.monotonic() + seconds
        self.kept: dict[str, Any] = {"parameters": parameters, **describe_machine(), "measured": {}}
        if path.exists():
            found = json.loads(path.read_text())
            if found.get("parameters") == parameters:  # else it belongs to another experiment
                self.kept["measured"] = {
                    name: row
                    for name, row in found["measured"].items()
                    if row["cores_used_by_others"] <= redo_cores
                }

    def measure(self, name: str, take: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``take`` returns, and how much others disturbed it. Raises Later."""
        measured: dict[str, Any] = self.kept["measured"]
        if name not in measured:
            if time.monotonic() > self.until:
                raise Later(f"{name} and what follows: run the same command again")
            begin_s, begin = time.monotonic(), _others_busy_s()
            row = take()
            others = (_others_busy_s() - begin) / (time.monotonic() - begin_s)
            measured[name] = {**row, "cores_used_by_others": round(others, 2)}
            shown = {k: v for k, v in measured[name].items() if not isinstance(v, list | dict)}
            print(name, json.dumps(shown), flush=True)
            self.write()
        kept: dict[str, Any] = measured[name]
        return kept

    def write(self, **more: Any) -> None:
        self.kept.update(more)
        self.path.write_text(json.dumps(self.kept, indent=1) + "\n")


def _others_busy_s() -> float:
    """Processor seconds of the machine so far, less this process's and its ended children's."""
    ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    user, nice, system, _, _, irq, softirq, steal = ticks
    busy_s = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy_s - sum(os.times()[:4])


def describe_machine() -> dict[str, Any]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }
    return {"device": processor_name(), "cores": os.cpu_count(), "versions": versions}
