"""The GPU runtime: Triton kernels launched straight, GEMMs and what else through PyTorch.

In: an assembly, the program's weights and a device. Out: something that runs it over an address
table, as the CPU runtime does; nothing is allocated, and nothing waits for the device::

    failed = runtime.run(table, sizes, state)   # 0, or which launch met an index out of range
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from turbotx import ir
from turbotx.assemble import Assembly
from turbotx.kernels.dependent import can_depend, make_dependent
from turbotx.kernels.gemm_choice import BUCKETS, MOST_TURNS
from turbotx.kernels.gemm_template import GemmTemplate
from turbotx.kernels.targets import Job
from turbotx.kernels.tuned import make_chooser
from turbotx.options import Options
from turbotx.runtime.aten import AtenSteps
from turbotx.runtime.cuda_frame import Frame, Key, Layout, lay_out
from turbotx.runtime.cuda_gemm import GemmFamily, bind_gemm, find_library_call, uses_tf32
from turbotx.runtime.cuda_launch import AttentionFamily, KernelFamily, Part, SizeTable
from turbotx.runtime.cuda_status import Status
from turbotx.runtime.cuda_weights import Held, PlacedWeights
from turbotx.runtime.device import Device, Grid
from turbotx.runtime.share import Share, make_tiles
from turbotx.runtime.state import RunState
from turbotx.runtime.watch import Watch
from turbotx.runtime.weights import Weights
from turbotx.sizes import compile_evaluator

# Sequence lengths whose kernels are built before the first run: below and at the edges of the
# tiles for run-time lengths, with and without sizes that allow 128-bit accesses.
EXPECTED_LENGTHS = (16, 17, 256, 250, 512, 500)

Family = KernelFamily | AttentionFamily | GemmFamily


class CudaRuntime:
    """Loads a program's kernels on a device and queues its launches.

    builds: how many kernels had to be compiled. sources: the Triton source by kernel and tile.
    """

    def __init__(
        self, assembly: Assembly, weights: Weights, options: Options, dims: Sequence[str],
        device: Device, share: Share | None = None,
    ) -> None:  # fmt: skip
        """share: the calls that it serves; None: all. `build_expected` builds what they need."""
        self.assembly, self.weights, self.device = assembly, weights, device
        self.torch_device, self.share = device.torch_device, share
        self.builds = 0
        self.sources: dict[str, str] = {}
        self._dims = tuple(dims)
        self._functions: dict[int, tuple[Job, Any]] = {}
        self._depends = options.pdl and can_depend(device.target)
        launches = assembly.launches
        self.table = SizeTable(list(assembly.tensors))
        self._layouts: dict[Key, Layout] = {}
        self._checks: dict[int, int] = {}
        self._kernels: dict[str, KernelFamily] = {}
        self._shared: dict[object, GemmFamily] = {}
        self.families = self._find_families(options)
        steps = AtenSteps(dims)
        outside = {n for n, t in assembly.tensors.items() if t.kind in ("input", "output")}
        self._gemms, self._steps = {}, {}
        for i, launch in enumerate(launches):
            if launch.kind == "gemm" and not launch.target.folds:  # type: ignore[attr-defined]
                called, _ = find_library_call(launch)
                fixed = not outside & {a.tensor for a in called.args if a is not None}
                self._gemms[i] = (bind_gemm(called, steps), fixed)
            elif i not in self.families:
                self._steps[i] = steps.make(launch)
        self._status = Status(device, [self._checks.get(i, 0) for i in range(len(launches))])
        self.placed = PlacedWeights(weights, device, self.table.slots)

    @property
    def slot_count(self) -> int:
        """How many addresses its table holds."""
        return len(self.table.slots)

    # --- kernels ---

    def _find_families(self, options: Options) -> dict[int, Family]:
        if options.backend == "aten":
            return {}
        found: dict[int, Family] = {}
        left_by: dict[str, GemmTemplate] = {}
        target, tiles = self.device.target, make_tiles(options, self.device)
        self._choose = make_chooser(tiles.overrides, target, tiles.tuned)
        for i, launch in enumerate(self.assembly.launches):
            if isinstance(launch.target, ir.Kernel):
                found[i] = self._kernel(i, "kernel", launch)
            elif launch.kind in ("attention", "product"):
                found[i] = AttentionFamily(launch, target, self.table, tiles)
                self._lay_out(i, "kernel", launch)
            elif launch.workspaces:
                _, ends = find_library_call(launch)
                finish = [self._kernel(i, f"end{k}", end) for k, end in enumerate(ends)]
                family = GemmFamily(launch, target, self.table, tiles, finish, left_by)
                family = found[i] = self._shared.setdefault(family.key, family)
                if family.template is not None:
                    left_by |= dict.fromkeys(launch.writes[1:], family.template)
                for which, layout in family.layouts(launch, self.table).items():
                    self._layouts[i, which] = layout
        return found

    def _kernel(self, i: int, which: str, launch: ir.Launch) -> KernelFamily:
        """Return the family of a generated kernel, with its arguments laid out."""
        kernel = launch.target
        assert isinstance(kernel, ir.Kernel)
        digest = kernel.digest()
        if digest not in self._kernels:
            target = self.device.target
            self._kernels[digest] = KernelFamily(kernel, target, self.table, self._choose)
        self._lay_out(i, which, launch)
        return self._kernels[digest]

    def _lay_out(self, i: int, which: str, launch: ir.Launch) -> None:
        body = launch.target.body if isinstance(launch.target, ir.Kernel) else ()
        checks = sum(isinstance(s, ir.Check) for s in body)
        self._checks[i] = max(checks, self._checks.get(i, 0))
        operands = [a for a in launch.args if a is not None]
        sizes = [self.table.value(e) for e in launch.sizes]
        self._layouts[i, which] = lay_out(operands, "status" if checks else "", sizes, self.table)

    def expected_jobs(self, example_dims: Sequence[int]) -> list[Job]:
        """Return what the shapes to expect will need, of the calls that it serves."""
        evaluate = compile_evaluator(list(self.table.values), self._dims)
        first = [tuple(example_dims)] if example_dims else []
        dims, share = [*first, *expected_dims(self._dims)], self.share
        some = evaluate(*dims[0])
        shapes = [evaluate(*d) for d in dims if share is None or share.holds(d)]
        jobs: list[Job | None] = []
        for family in self.families.values():
            jobs += [part.job for sizes in shapes for part in family.pick(sizes)]
            if isinstance(family, GemmFamily):
                tokens = self.table.expression(family.tokens)
                buckets = BUCKETS if share is None else share.buckets_of(tokens)
                jobs += family.expected(some, buckets)
        return list({id(job): job for job in jobs if job is not None}.values())

    def load(self, jobs: Sequence[Job]) -> list[Any]:
        """Return the functions of jobs, which are few objects however many launches there are."""
        new = {id(job): job for job in jobs if id(job) not in self._functions}
        if new:
            functions, compiled = self.device.load([self.adapt(j) for j in new.values()])
            self.builds += compiled
            for job, function in zip(new.values(), functions, strict=True):
                self._functions[id(job)] = (job, function)
                tiles = "".join(f"_{name.lower()}{value}" for name, value in job.constexprs)
                self.sources[job.name + tiles] = job.source
        return [self._functions[id(job)][1] for job in jobs]

    def adapt(self, job: Job) -> Job:
        """Return a job as the options want it."""
        return make_dependent(job) if self._depends else job

    def bind(self, sizes: Any) -> _Bound:
        """Return the functions and grids for a shape, kept with its sizes.

        Must be called once outside of a graph's capture: it may build kernels, and load them.
        """
        bound: _Bound | None = getattr(sizes, "bound", None)
        settings = uses_tf32()
        if bound is None or bound.settings != settings:
            picked = {i: family.pick(sizes) for i, family in self.families.items()}
            bound = sizes.bound = _Bound({i: self._ready(p) for i, p in picked.items()}, settings)
        return bound

    def is_loaded(self, sizes: Any) -> bool:
        """Tell whether `bind` would neither build nor load a kernel."""
        jobs = (p.job for family in self.families.values() for p in family.pick(sizes))
        return all(job is None or id(job) in self._functions for job in jobs)

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
        self, i: int, parts: Sequence[_Ready], frame: Frame, stream: Any, state: RunState,
        views: dict[int, Callable[[], object]], follows: bool = False,
    ) -> bool:  # fmt: skip
        """Queue parts of a launch; `follows`, and the result: the last thing queued is a kernel of
        ours behind which the next one may start early. What PyTorch queues may be none."""
        for which, function, grid in parts:
            if function is None:
                self.device.call(self._step(i, state, views))
            else:
                self.device.launch(function, grid, frame.addresses[i, which], stream, follows)
            follows = self._depends and function is not None
        return follows

    # --- weights ---

    def fill_weights(self, table: Any) -> tuple[int, Held]:
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
            for i in range(len(self.assembly.launches)):
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

    def frame(self, table: Any) -> Frame:
        """Return the arguments of every kernel at one table, made at its first use.

        Must be called once outside of a graph's capture: what it allocates has to be zero at once.
        """
        frame: Frame | None = getattr(table, "frame", None)
        if frame is None:
            split = any(layout.cell == "turns" for layout in self._layouts.values())
            count = MOST_TURNS if split else 0
            turns = torch.zeros(count, dtype=torch.int32, device=self.torch_device)
            count = len(self.table.values)
            frame = table.frame = Frame(table, self._layouts, count, self._status, turns)
        return frame


def build_expected(runtimes: Sequence[CudaRuntime], example_dims: Sequence[int]) -> None:
    """Build what programs of one call will need, in parallel and before the first run."""
    first, jobs = runtimes[0], [r.expected_jobs(example_dims) for r in runtimes]
    # All at once: what a device has loaded costs the second program nothing.
    new = [r.adapt(j) for r, own in zip(runtimes, jobs, strict=True) for j in own]
    together = {job.digest(): job for job in new}
    first.builds += first.device.load(list(together.values()))[1]
    for runtime, own in zip(runtimes, jobs, strict=True):
        runtime.load(own)


def expected_dims(dims: Sequence[str]) -> Iterable[tuple[int, ...]]:
    """Shapes for which kernels are built ahead; the first dim is the batch, as are others' _d0."""
    for length in EXPECTED_LENGTHS:
        batch = 16 if length % 16 == 0 else 1
        yield tuple(batch if k == 0 or "_d0" in n else length for k, n in enumerate(dims))


# A part whose kernel is loaded: its list of arguments, its function or None for PyTorch, its grid.
_Ready = tuple[str, Any, Grid]
PYTORCH: list[_Ready] = [("call", None, (1, 1, 1))]


class _Bound:
    """A shape's compiled functions and grids, by launch, under PyTorch's settings."""

    def __init__(self, parts: dict[int, list[_Ready]], settings: object) -> None:
        self.parts, self.settings = parts, settings
