"""Stand-ins for cubins: what is saved names its jobs, and a device of a file interprets these.

In: a model on the CPU and targets. Out: a file whose machine code is a job's digest, written in no
time, and a device that runs such files in Triton's interpreter::

    cubins = Cubins(monkeypatch); turbotx.save(fast, path, targets=["sm_90"])
    fast = cubins.load(path)
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import turbotx
from tests.runtime.cuda.stand_in_device import InterpretedDevice
from turbotx.errors import DeviceError
from turbotx.kernels.job import Binary, Job

FRESH_DEVICE = """
import turbotx.saved.places

class Device:
    target, torch_device = "sm_90", torch.device("cpu")
    launched, graphs = [], 0
    def active(self): return nullcontext()
    def describe(self): return "a stand-in"
    def place(self, binaries): return [b.name for b in binaries]
    def stream(self): return 7
    def launch(self, function, *given): self.launched.append(function)
    def call(self, step): step()
    def wait(self): pass
    def retain(self, tensors): pass
    def is_capturing(self): return False
    def new_status(self, count): return torch.zeros(count, dtype=torch.int32)
    def recorder(self): return self
    def capture(self, body):
        self.graphs += 1
        body()
        return self
    def replay(self): pass

device = Device()
turbotx.saved.places.open_device = lambda place, backend, builds: device
"""
"""For a process that has no Triton: a device that counts launches and computes nothing."""


def run_fresh(code: str, path: Path) -> str:
    """Run code in a process of its own; return what it printed. DEVICE stands for a device, PATH
    for a file."""
    code = textwrap.dedent(code).replace("DEVICE", FRESH_DEVICE).replace("PATH", repr(str(path)))
    environment = {"PATH": "", "PYTHONPATH": str(Path(turbotx.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass(frozen=True)
class NamedBuild:
    """A build whose machine code is the digest of its job."""

    job: Job

    def binary(self) -> Binary:
        job, image = self.job, self.job.digest().encode()
        threads = 32 * job.num_warps
        return Binary(job.name, job.target, job.name, threads, job.taken + 2, 0, image, job.pdl)


class FileDevice(InterpretedDevice):
    """Interprets the jobs that a file's cubins name; it compiles only where it is told to."""

    def __init__(self, jobs: dict[bytes, Job], target: str) -> None:
        super().__init__()
        self.target, self.jobs = target, jobs
        self.placed: list[Binary] = []
        self.ran: list[Job] = []
        self.compiles = False

    def place(self, binaries: Sequence[Binary]) -> list[Any]:
        self.placed += binaries
        return [self.jobs[b.image] for b in binaries]

    def execute(self, job: Job, grid: Any, values: list[int]) -> None:
        self.ran.append(job)
        super().execute(job, grid, values)

    def load(self, jobs: Sequence[Job]) -> tuple[list[Any], int]:
        if not self.compiles:
            raise ImportError("No module named 'triton'")
        return super().load(jobs)


class Cubins:
    """Keeps what was built, and opens devices that run it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.jobs: dict[bytes, Job] = {}
        self._monkeypatch = monkeypatch
        monkeypatch.setattr("turbotx.saved.save.build", self._build)
        self.device: FileDevice

    def _build(
        self, jobs: Sequence[Job], progress: Callable[..., None], measure: bool
    ) -> list[NamedBuild]:
        self.jobs.update({job.digest().encode(): job for job in jobs})
        return [NamedBuild(job) for job in jobs]

    def load(self, path: Path, target: str = "sm_90", **options: Any) -> Any:
        """Load a file on a GPU of a target, and refuse to look for another."""
        device = self.device = FileDevice(self.jobs, target)

        def open_device(place: torch.device, backend: str, builds: bool = True) -> FileDevice:
            if place.type != "cuda" or builds:
                raise DeviceError(f"{place} is no place for a file")
            return device

        self._monkeypatch.setattr("turbotx.saved.places.open_device", open_device)
        return turbotx.load(path, **options)
