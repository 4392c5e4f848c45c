"""Queues the launches of a GPU program: Triton kernels through the driver, the rest by PyTorch.

In: an executable, its launches' families of kernels, weights, a device. Out: a runner over address
tables, which neither allocates nor synchronizes. `CudaRuntime` compiles kernels on demand,
`turbotx.saved` reads them from a file::

    failed = runtime.run(table, sizes, state)   # 0, or the launch with an index out of range
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
    """Queues a program's launches on a device.

    families: by the number in each launch. builds: how many kernels were compiled.
    """

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
        """Return the loaded kernels of jobs, cached by job."""
        new = {id(job): job for job in jobs if id(job) not in self.functions}
        if new:
            loaded = self._obtain(list(new.values()))
            for job, function in zip(new.values(), loaded, strict=True):
                self.functions[id(job)] = (job, function)
        return [self.functions[id(job)][1] for job in jobs]

    @abstractmethod
    def _obtain(self, jobs: Sequence[Any]) -> Sequence[Any]:
        """Return the loaded kernels of new jobs; counts builds."""

    def bind(self, sizes: Any) -> _Bound:
        """Return the kernels and grids of a shape, cached by its sizes.

        The first call for a shape must be outside a graph capture: it may build and load kernels.
        """
        bound: _Bound | None = getattr(sizes, "bound", None)
        settings = uses_tf32()
        if bound is None or bound.settings != settings:
            picked = {i: family.pick(sizes) for i, family in self._families.items()}
            bound = sizes.bound = _Bound({i: self._ready(p) for i, p in picked.items()}, settings)
        return bound

    def is_loaded(self, sizes: Any) -> bool:
        """Return whether `bind` needs no building or loading."""
        jobs = (p.job for family in self._families.values() for p in family.pick(sizes))
        return all(job is None or id(job) in self.functions for job in jobs)

    def _ready(self, parts: Sequence[Part]) -> list[_Ready]:
        """Return parts with loaded kernels."""
        functions = iter(self.load([p.job for p in parts if p.job is not None]))
        return [
            (p.which, None if p.job is None else next(functions), p.grid)
            for p in parts
            if 0 not in p.grid or p.job is None
        ]

    def queue(self, launch: int, parts: Sequence[Part], table: Any, state: RunState) -> None:
        """Queue one launch with the given variants, on a table that `run` has used."""
        self._queue(launch, self._ready(parts), table.arguments, self.device.stream(), state, {})

    def _queue(
        self, i: int, parts: Sequence[_Ready], arguments: KernelArguments, stream: Any,
        state: RunState, views: dict[int, Callable[[], object]], follows: bool = False,
    ) -> bool:  # fmt: skip
        """Queue a launch's parts.

        follows, and the result: whether the last work queued is one of turbotx's kernels, so that
        the next may use a dependent launch. PyTorch's calls may queue no kernel at all."""
        for which, function, grid in parts:
            if function is None:
                self.device.call(self._step(i, state, views))
            else:
                self.device.launch(function, grid, arguments.addresses[i, which], stream, follows)
            follows = self.gpu.depends and function is not None
        return follows

    # --- weights ---

    def fill_weights(self, table: Any) -> tuple[int, WeightsVersion]:
        """Write the addresses of parameters and hoisted constants into a table.

        Returns their version, and an object to keep alive while the table is used. Raises
        InputError if a parameter is on another device.
        """
        return self.placed.fill(table)

    # --- running ---

    def run(
        self, table: Any, sizes: Any, state: RunState,
        ticks: Any = None, watches: Sequence[Watch] = (),
    ) -> int:  # fmt: skip
        """Queue all launches in order on the current stream.

        Returns 0, or launch << 32 | code if a kernel reported an index out of range, perhaps of an
        earlier call. ticks: filled with the start and end of each launch, in ns since the first
        start; synchronizes. watches: called for each launch as it is queued.
        """
        bound = self.bind(sizes)
        arguments = self.arguments(table)
        arguments.refill(sizes)
        views = arguments.views(bound, (state.arena.data_ptr(), self.weights.version))
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
                follows = self._queue(i, parts, arguments, stream, state, views, follows)
                if ticks is not None:
                    marks.append(self.device.clock())
                for watch in watches:
                    watch.after(i, state)
        self._count(marks, ticks)
        return self.failed()

    def _count(self, marks: Sequence[Any], ticks: Any) -> None:
        """Write the ns of each mark since the first, as a sum of differences: the driver's
        resolution is better for short times."""
        passed = 0
        for k, mark in enumerate(marks):
            passed += self.device.elapsed(marks[k - 1], mark) if k else 0
            ticks[k] = passed

    def failed(self) -> int:
        """Return and clear a kernel's error report, if one has arrived; does not synchronize."""
        return self._status.take()

    def _step(
        self, i: int, state: RunState, views: dict[int, Callable[[], object]]
    ) -> Callable[[], object]:
        """Return a launch's PyTorch call; a GEMM's over planned memory is cached."""
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

    def arguments(self, table: Any) -> KernelArguments:
        """Return the argument arrays of a table, created at its first use.

        The first call must be outside a graph capture: it allocates zeroed memory.
        """
        arguments: KernelArguments | None = getattr(table, "arguments", None)
        if arguments is None:
            turns = torch.zeros(self.gpu.turns, dtype=torch.int32, device=self.torch_device)
            layouts, count = self._layouts, self._value_count
            cells = self.gpu.cells
            arguments = KernelArguments(table, layouts, count, self._status, turns, cells)
            table.arguments = arguments
        return arguments


# A loaded part: name of its argument list, kernel or None for PyTorch, grid.
_Ready = tuple[str, Any, Grid]
PYTORCH: list[_Ready] = [("call", None, (1, 1, 1))]


class _Bound:
    """A shape's loaded parts by launch, and the PyTorch settings they were chosen for."""

    def __init__(self, parts: dict[int, list[_Ready]], settings: object) -> None:
        self.parts, self.settings = parts, settings
