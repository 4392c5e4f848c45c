"""Stand-ins for a CUDA device: programs bound for a GPU run, or are written down, on a CPU.

In: what a program asks of its device. Out: a log of every request; `InterpretedDevice` also runs
the kernels in Triton's interpreter over the addresses that it was given, so that results are real::

    device = InterpretedDevice(); fast = bind_to(device, model, monkeypatch)

A captured graph holds the values that its arguments had, as CUDA's does, and runs nothing until it
is replayed.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import turbotx
from tests.kernels.triton.triton_runner import interpreting, load_function
from turbotx.kernels.job import Binary, Job
from turbotx.kernels.triton.compiler import POINTEES
from turbotx.kernels.triton.dependent import IMPORT, WAIT
from turbotx.runtime.cuda.arguments import EXTRA_ARGUMENTS

DTYPES = {name: dtype for dtype, name in POINTEES.items()}
# The interpreter's state is the process's.
_interpreter = threading.Lock()


class RecordedGraph:
    def __init__(self, device: RecordingDevice, steps: list[Callable[[], object]]) -> None:
        self.device, self.steps, self.replays = device, steps, 0

    def replay(self) -> None:
        assert self.device.captured is None, "a graph was replayed while another was captured"
        self.device.log.append(("replay", len(self.steps)))
        self.replays += 1
        for step in self.steps:
            step()


class RecordingDevice:
    """Writes every request down and runs PyTorch's part; kernels do nothing."""

    target = "sm_90"

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.log: list[tuple[Any, ...]] = []
        self.graphs: list[RecordedGraph] = []
        self.loaded: dict[str, Job] = {}
        self.current_stream = "default"
        self.users_capture = False
        self.refuses: Exception | None = None
        self._local = threading.local()

    @property
    def captured(self) -> list[Callable[[], object]] | None:
        return getattr(self._local, "captured", None)

    def active(self) -> Any:
        return nullcontext()

    def load(self, jobs: Sequence[Job]) -> tuple[list[Any], int]:
        new = {job.digest(): job for job in jobs if job.digest() not in self.loaded}
        assert not new or self.captured is None, "a kernel was loaded while a graph was captured"
        self.loaded.update(new)
        return [self.loaded[job.digest()] for job in jobs], len(new)

    def place(self, binaries: Sequence[Binary]) -> list[Any]:
        raise AssertionError("no program of a file runs on this stand-in")

    def stream(self) -> Any:
        return self.current_stream

    def launch(
        self, function: Job, grid: Any, addresses: Any, stream: Any, dependent: bool = False
    ) -> None:
        values = read_arguments(function, addresses)
        assert function.pdl or not dependent
        self.log.append(("launch", function.name, grid, stream, tuple(values), dependent))
        self._now_or_later(lambda: self.execute(function, grid, values))

    def execute(self, job: Job, grid: Any, values: list[int]) -> None:
        pass

    def call(self, step: Callable[[], object]) -> None:
        self.log.append(("call", getattr(getattr(step, "func", None), "__name__", "")))
        self._now_or_later(step)

    def _now_or_later(self, step: Callable[[], object]) -> None:
        if self.captured is not None:
            self.captured.append(step)
        else:
            step()

    def recorder(self) -> RecordingDevice:
        return self

    def capture(self, body: Callable[[], object]) -> RecordedGraph:
        if self.refuses is not None:
            raise self.refuses
        assert self.captured is None
        self.log.append(("capture",))
        steps: list[Callable[[], object]] = []
        self._local.captured = steps
        try:
            body()
        finally:
            self._local.captured = None
        graph = RecordedGraph(self, steps)
        self.graphs.append(graph)
        return graph

    def is_capturing(self) -> bool:
        return self.users_capture

    def wait(self) -> None:
        assert not self.users_capture, "a stream that is being captured cannot be waited for"
        self.log.append(("wait", self.current_stream))

    def retain(self, tensors: Sequence[torch.Tensor]) -> None:
        assert all(isinstance(t, torch.Tensor) for t in tensors)
        self.log.append(("retain", self.current_stream, [t.data_ptr() for t in tensors]))

    def new_status(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32)

    def clock(self) -> int:
        self.log.append(("clock",))
        return len(self.log)

    def elapsed(self, begin: int, end: int) -> int:
        return end - begin

    def describe(self) -> str:
        return "a stand-in"

    def names(self, kind: str) -> list[Any]:
        return [entry[1] for entry in self.log if entry[0] == kind]


class InterpretedDevice(RecordingDevice):
    """Runs kernels in Triton's interpreter."""

    def __init__(self) -> None:
        super().__init__()
        self._functions: dict[str, Any] = {}

    def execute(self, job: Job, grid: Any, values: list[int]) -> None:
        kinds = [kind for _, kind in job.signature if kind != "constexpr"]
        given = [
            memory_at(value, DTYPES[kind[1:]]) if kind[0] == "*" else value
            for kind, value in zip(kinds, values, strict=True)
        ]
        digest = job.digest()
        with _interpreter, interpreting():
            if digest not in self._functions:
                self._functions[digest] = load_function(without_waiting(job.source), job.name)
            self._functions[digest][grid](*given, **dict(job.constexprs))


def without_waiting(source: str) -> str:
    """Return a kernel's source less what the interpreter has no word for, and no need of."""
    meanwhile = rf"\n    # Meanwhile the weight.*?(?={re.escape(WAIT)})"
    source = re.sub(meanwhile, "", source, flags=re.DOTALL)
    return source.replace(WAIT, "").replace(IMPORT, "")


def read_arguments(job: Job, addresses: Any) -> list[int]:
    """Return a launch's arguments as the driver would read them."""
    kinds = [kind for _, kind in job.signature if kind != "constexpr"]
    assert len(addresses) >= len(kinds) + EXTRA_ARGUMENTS
    values = []
    for (name, kind), address in zip(job.signature, addresses, strict=False):
        if kind == "constexpr":
            break
        wanted = ctypes.c_int32 if kind == "i32" else ctypes.c_int64
        value = wanted.from_address(address).value
        if name in job.divisible:
            assert value % 16 == 0, f"{job.name}: {name}={value} is no multiple of 16"
        values.append(value)
    return values


def memory_at(address: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor whose memory begins at an address; only the interpreter looks behind it."""
    raw = (ctypes.c_uint8 * dtype.itemsize).from_address(address)
    return torch.frombuffer(raw, dtype=torch.uint8).view(dtype)


def bind_to(
    device: RecordingDevice, model: Any, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Any:
    """Optimize a model of the CPU as if `device` were where it lies."""
    monkeypatch.setattr("turbotx.engine.engine.open_device", lambda place, backend: device)
    return turbotx.optimize(model, **options)
