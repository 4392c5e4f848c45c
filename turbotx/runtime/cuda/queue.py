"""The launches of a GPU program: Triton kernels launched straight, GEMMs and more through PyTorch.

In: an executable, who says what its launches queue at a shape, weights, a device. Out: something
that runs it over an address table; nothing is allocated, nothing waits for the device. A
`CudaRuntime` compiles kernels when they are asked for, `turbotx.saved` has them in a file::

    failed = runtime.run(table, sizes, state)   # 0, or which launch met an index out of range
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from turbotx.program.executable import CalledLaunch, Executable, QueuedLaunch
from turbotx.runtime.aten import make_step
from turbotx.runtime.cuda.arguments import KernelArguments
from turbotx.runtime.cuda.library_gemm import Call, make_gemm
from turbotx.runtime.cuda.parts import Family, Part
from turbotx.runtime.cuda.settings import uses_tf32
from turbotx.runtime.cuda.status import Status
from turbotx.runtime.cuda.weights import PlacedWeights, WeightsVersion
from turbotx.runtime.device import Device, Grid
from turbotx.runtime.state import RunState, Step
from turbotx.runtime.tensor_watch import start_native_watch
from turbotx.runtime.watch import Watch
from turbotx.runtime.weights import Weights


class CudaQueue(ABC):
    """Queues a program's launches on a device. families: the kernels of launches, by the number
    that those give. builds: how many kernels had to be compiled."""

    def __init__(
        self, executable: Executable, families: Sequence[Family], weights: Weights, device: Device
    ) -> None:
        assert executable.gpu is not None, "compiled for another device"
        self.device, self.weights, self.gpu = device, weights, executable.gpu
        self.torch_device = device.torch_device
        self.builds = 0
        self._launches, self._value_count = executable.launches, len(executable.values.texts)
        self._layouts = {(i, which): layout for i, which, layout in self.gpu.layouts}
        self._families: dict[int, Family] = {}
        self._gemms: dict[int, tuple[Callable[[RunState], Call], bool]] = {}
        self._steps: dict[int, Step] = {}
        for i, launch in enumerate(executable.launches):
            if isinstance(launch, CalledLaunch):
                self._steps[i] = make_step(launch.call, executable.dims)
                continue
            assert isinstance(launch, QueuedLaunch)
            if launch.family is not None:
                self._families[i] = families[launch.family]
            if launch.gemm is not None:
                self._gemms[i] = (make_gemm(launch.gemm, executable.dims), launch.gemm.fixed)
        self.functions: dict[int, tuple[Any, Any]] = {}
        self._status = Status(device, self.gpu.checks)
        if device.torch_device.type == "cuda":
            weights.later = start_native_watch()
        slots = {name: executable.slots[name] for name in executable.weights}
        self.placed = PlacedWeights(weights, device, slots)

    # --- kernels ---

    def load(self, jobs: Sequence[Any]) -> list[Any]:
        """Return the functions of jobs, which are few objects however many launches there are."""
        new = {id(job): job for job in jobs if id(job) not in self.functions}
        if new:
            loaded = self._obtain(list(new.values()))
            for job, function in zip(new.values(), loaded, strict=True):
                self.functions[id(job)] = (job, function)
        return [self.functions[id(job)][1] for job in jobs]

    @abstractmethod
    def _obtain(self, jobs: Sequence[Any]) -> Sequence[Any]:
        """Return the functions of jobs that were not asked for before; counts what it builds."""

    def bind(self, sizes: Any) -> _Bound:
        """Return the functions and grids for a shape, kept with its sizes.

        Must be called once outside of a graph's capture: it may build kernels, and load them.
        """
        bound: _Bound | None = getattr(sizes, "bound", None)
        settings = uses_tf32()
        if bound is None or bound.settings != settings:
            picked = {i: family.pick(sizes) for i, family in self._families.items()}
            bound = sizes.bound = _Bound({i: self._ready(p) for i, p in picked.items()}, settings)
        return bound

    def is_loaded(self, sizes: Any) -> bool:
        """Tell whether `bind` would neither build nor load a kernel."""
        jobs = (p.job for family in self._families.values() for p in family.pick(sizes))
        return all(job is None or id(job) in self.functions for job in jobs)

    def _ready(self, parts: Sequence[Part]) -> list[_Ready]:
        """Return parts with their kernels loaded."""
        functions = iter(self.load([p.job for p in parts if p.job is not None]))
        return [
            (p.which, None if p.job is None else next(functions), p.grid)
            for p in parts
            if 0 not in p.grid or p.job is None
        ]

    def queue(self, launch: int, parts: Sequence[Part], table: Any, state: RunState) -> None:
        """Queue one launch by other variants of its kernels, on a table that `run` has used."""
        self._queue(launch, self._ready(parts), table.frame, self.device.stream(), state, {})

    def _queue(
        self, i: int, parts: Sequence[_Ready], frame: KernelArguments, stream: Any, state: RunState,
        views: dict[int, Callable[[], object]], follows: bool = False,
    ) -> bool:  # fmt: skip
        """Queue parts of a launch; `follows`, and the result: the last thing queued is a kernel of
        ours behind which the next one may start early. What PyTorch queues may be none."""
        for which, function, grid in parts:
            if function is None:
                self.device.call(self._step(i, state, views))
            else:
                self.device.launch(function, grid, frame.addresses[i, which], stream, follows)
            follows = self.gpu.depends and function is not None
        return follows

    # --- weights ---

    def fill_weights(self, table: Any) -> tuple[int, WeightsVersion]:
        """Write the addresses of everything made from parameters into a table.

        Returns their version, and what must be kept alive as long as the table is used. Raises
        InputError where a parameter lies on another device.
        """
        return self.placed.fill(table)

    # --- running ---

    def run(
        self, table: Any, sizes: Any, state: RunState,
        ticks: Any = None, watches: Sequence[Watch] = (),
    ) -> int:  # fmt: skip
        """Queue every launch in order on the current stream.

        Returns 0, or launch << 32 | code where a kernel has met an index out of range, which may
        have been in an earlier call. `ticks` takes when each launch began and ended on the device,
        in nanoseconds since the first began, and waits for them. `watches` are told of each launch
        as it is queued.
        """
        bound = self.bind(sizes)
        frame = self.frame(table)
        frame.refill(sizes)
        views = frame.views(bound, (state.arena.data_ptr(), self.weights.version))
        marks: list[Any] = []
        follows = False
        with self.device.active():
            stream = self.device.stream()
            for i in range(len(self._launches)):
                for watch in watches:
                    watch.before(i, state)
                if ticks is not None:
                    marks.append(self.device.clock())
                follows = follows and ticks is None and not watches
                parts = bound.parts.get(i, PYTORCH)
                follows = self._queue(i, parts, frame, stream, state, views, follows)
                if ticks is not None:
                    marks.append(self.device.clock())
                for watch in watches:
                    watch.after(i, state)
        self._count(marks, ticks)
        return self.failed()

    def _count(self, marks: Sequence[Any], ticks: Any) -> None:
        """Write the nanoseconds of marks since the first, summed from one to the next: a device
        measures short times exactly, and long ones coarsely."""
        passed = 0
        for k, mark in enumerate(marks):
            passed += self.device.elapsed(marks[k - 1], mark) if k else 0
            ticks[k] = passed

    def failed(self) -> int:
        """Return and forget what a kernel has reported by now, without waiting for any."""
        return self._status.take()

    def _step(
        self, i: int, state: RunState, views: dict[int, Callable[[], object]]
    ) -> Callable[[], object]:
        """Return PyTorch's part; that of a GEMM over planned memory is kept for the next call."""
        if i in views:
            return views[i]
        gemm = self._gemms.get(i)
        if gemm is None:
            step = self._steps[i]
            return lambda: step(state)
        bound = gemm[0](state)
        if gemm[1]:
            views[i] = bound
        return bound

    def frame(self, table: Any) -> KernelArguments:
        """Return the arguments of every kernel at one table, made at its first use.

        Must be called once outside of a graph's capture: what it allocates has to be zero at once.
        """
        frame: KernelArguments | None = getattr(table, "frame", None)
        if frame is None:
            turns = torch.zeros(self.gpu.turns, dtype=torch.int32, device=self.torch_device)
            layouts, count = self._layouts, self._value_count
            cells = self.gpu.cells
            frame = KernelArguments(table, layouts, count, self._status, turns, cells)
            table.frame = frame
        return frame


# A part whose kernel is loaded: its list of arguments, its function or None for PyTorch, its grid.
_Ready = tuple[str, Any, Grid]
PYTORCH: list[_Ready] = [("call", None, (1, 1, 1))]


class _Bound:
    """A shape's compiled functions and grids, by launch, under PyTorch's settings."""

    def __init__(self, parts: dict[int, list[_Ready]], settings: object) -> None:
        self.parts, self.settings = parts, settings
