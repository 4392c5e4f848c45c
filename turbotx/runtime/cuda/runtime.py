"""The GPU runtime: selects and builds the kernels of an assembly's launches.

In: an assembly and a target; then weights and a device. Out: the executable and the jobs of any
shape, without a device; and a `CudaQueue` that builds kernels on demand::

    LaunchKernels(assembly, ("batch", "seq"), tiles, options).at((1, 40))   # LaunchJob, ...
    failed = runtime.run(table, sizes, state)   # 0, or the launch with an index out of range
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from turbotx import ir
from turbotx.ir.expr import sizes_of
from turbotx.kernels.gemm_heuristics import BUCKETS, MOST_TURNS
from turbotx.kernels.job import Job
from turbotx.kernels.schedule_selector import Tiles
from turbotx.kernels.triton.cells import read_cells
from turbotx.kernels.triton.dependent import can_depend, make_dependent
from turbotx.kernels.triton.gemm_template import GemmTemplate
from turbotx.kernels.tuned import make_chooser
from turbotx.options import Options
from turbotx.program.assembly import Assembly
from turbotx.program.executable import (
    ArgumentLayout,
    DeviceCells,
    GpuTables,
    QueuedLaunch,
    TokenRange,
)
from turbotx.program.link import LaunchLayout, facts_of, find_integers, link
from turbotx.program.steps import GrowingDims, expected_steps, is_split
from turbotx.runtime.cuda.arguments import Key
from turbotx.runtime.cuda.experts import ExpertsFamily, RouteFamily
from turbotx.runtime.cuda.gemm import GemmFamily, find_library_call, plain_gemm
from turbotx.runtime.cuda.queue import CudaQueue
from turbotx.runtime.cuda.step_variants import SplitFamily
from turbotx.runtime.cuda.variants import AttentionFamily, KernelFamily, SequenceFamily, lay_out
from turbotx.runtime.device import Device
from turbotx.runtime.weights import Weights

# Sequence lengths whose kernels are built before the first run: around the edges of tiles, with and
# without multiples of 16, which allow 128-bit accesses.
EXPECTED_LENGTHS = (16, 17, 256, 250, 512, 500)

Compiling = KernelFamily | AttentionFamily | GemmFamily | RouteFamily | SequenceFamily


@dataclass(frozen=True)
class LaunchJob:
    """A kernel of a launch (none for parts that PyTorch runs).

    launch: the program's, or one of its `GemmLaunch.fallback`.
    """

    launch: ir.Launch
    job: Job


class LaunchKernels:
    """The kernels of a program's launches at any shape; needs no GPU.

    families: by launch, missing if PyTorch runs all of it. executable: the program.
    """

    def __init__(
        self, assembly: Assembly, dims: Sequence[str], tiles: Tiles, options: Options,
        token_range: TokenRange | None = None, steps: GrowingDims | None = None,
    ) -> None:  # fmt: skip
        """token_range: the calls that the program serves; None: all. steps: the dims that grow with
        decoding steps and that kernels read from device memory."""
        self.assembly, self.target, self.steps = assembly, tiles.target, steps
        slots = {name: k for k, name in enumerate(assembly.tensors)}
        self.integers, unread = find_integers(assembly)
        read = slots.keys() - unread
        self.table = LaunchLayout(slots, token_range=token_range, read=read)
        self._layouts: dict[Key, ArgumentLayout] = {}
        self._checks: dict[int, int] = {}
        self._kernels: dict[str, KernelFamily] = {}
        self._shared: dict[object, GemmFamily] = {}
        self.families = {} if options.backend == "aten" else self._find_families(tiles)
        self.in_order = list({id(f): f for f in self.families.values()}.values())
        self._lay_out_launches({id(f): k for k, f in enumerate(self.in_order)})
        split = any(layout.cell == "turns" for layout in self._layouts.values())
        self._depends = options.pdl and can_depend(self.target)
        self.table.gpu = GpuTables(
            self.target,
            tuple((i, which, layout) for (i, which), layout in self._layouts.items()),
            tuple(self._checks.get(i, 0) for i in range(len(assembly.launches))),
            MOST_TURNS if split else 0,
            self._depends,
            None if steps is None else self._lay_out_cells(steps, dims),
        )
        self.executable = link(assembly, dims, options.planner, self.table)

    def _find_families(self, tiles: Tiles) -> dict[int, Compiling]:
        found: dict[int, Compiling] = {}
        left_by: dict[str, GemmTemplate | int] = {}
        target = self.target
        self._choose = make_chooser(tiles.overrides, target, tiles.tuned)
        for i, launch in enumerate(self.assembly.launches):
            if isinstance(launch, ir.KernelLaunch):
                found[i] = self._kernel(i, "kernel", launch)
            elif isinstance(launch, (ir.AttentionLaunch, ir.ProductLaunch)):
                found[i] = self._attention(i, launch, tiles)
                self._lay_out(i, "kernel", launch)
                left_by |= dict.fromkeys(launch.writes[1:], launch.kernel.head_dim)
            elif isinstance(launch, ir.GroupedGemmLaunch):
                grouped = ExpertsFamily(launch, target, self.table, tiles)
                if grouped.template is not None:
                    found[i] = self._shared.setdefault(grouped.key, grouped)
                    self._checks[i] = 1
                    self._layouts[i, "gemm"] = grouped.layouts(launch, self.table)["gemm"]
            elif isinstance(launch, ir.RouteLaunch):
                found[i] = RouteFamily(launch, target, self.table)
                self._lay_out(i, "kernel", launch)
            elif isinstance(launch, ir.SequenceLaunch):
                found[i] = SequenceFamily(launch, target, self.table)
                self._lay_out(i, "kernel", launch)
            elif isinstance(launch, ir.GemmLaunch) and launch.workspaces:
                _, ends = find_library_call(launch)
                finish = [self._kernel(i, f"end{k}", end) for k, end in enumerate(ends)]
                family = GemmFamily(launch, target, self.table, tiles, finish, left_by)
                family = found[i] = self._shared.setdefault(family.key, family)
                if family.template is not None:
                    left_by |= dict.fromkeys(launch.writes[1:], family.template)
                for which, layout in family.layouts(launch, self.table).items():
                    self._layouts[i, which] = layout
        return found

    def _kernel(self, i: int, which: str, launch: ir.KernelLaunch) -> KernelFamily:
        """Return the family of a generated kernel, and record its argument layout."""
        kernel = launch.kernel
        digest = kernel.digest()
        if digest not in self._kernels:
            family = KernelFamily(kernel, self.target, self.table, self._choose, self.steps)
            self._kernels[digest] = family
        self._lay_out(i, which, launch)
        return self._kernels[digest]

    def _attention(
        self, i: int, launch: ir.AttentionLaunch | ir.ProductLaunch, tiles: Tiles
    ) -> AttentionFamily:
        """Return the family of an attention launch, or of one of its products."""
        if not is_split(launch, self.steps):
            return AttentionFamily(launch, self.target, self.table, tiles, self.steps)
        assert isinstance(launch, ir.AttentionLaunch) and self.steps is not None
        family = SplitFamily(launch, self.target, self.table, tiles, self.steps)
        self._layouts[i, "split"] = family.layout(launch, self.table)
        return family

    def _lay_out_cells(self, steps: GrowingDims, dims: Sequence[str]) -> DeviceCells:
        """Return the entries of the tables that kernels read from device memory."""
        moving = tuple(k for e, k in self.table.values.items() if steps.move(e))
        grow = tuple(k for k, name in enumerate(dims) if name in steps.dims)
        rows, columns = (list(dims).index(name) for name in steps.room)
        slot = self.table.slots[steps.cache]
        return DeviceCells(grow, (rows, columns), moving, steps.cache, slot)

    def _lay_out(self, i: int, which: str, launch: ir.Launch) -> None:
        body = launch.kernel.body if isinstance(launch, ir.KernelLaunch) else ()
        checks = sum(isinstance(s, ir.Check) for s in body)
        self._checks[i] = max(checks, self._checks.get(i, 0))
        operands = [a for a in launch.operands if a is not None]
        sizes = [self.table.value(e) for e in launch.sizes]
        self._layouts[i, which] = lay_out(operands, "status" if checks else "", sizes, self.table)

    def _lay_out_launches(self, number: Mapping[int, int]) -> None:
        """Record the layouts of kernels and library calls. number: each family's, by id()."""
        tensors = self.assembly.tensors
        outside = {n for n, t in tensors.items() if t.kind in ("input", "output")}
        for i, launch in enumerate(self.assembly.launches):
            family, gemm = number.get(id(self.families.get(i))), None
            if isinstance(launch, ir.GemmLaunch) and not (launch.gemm.folds or launch.int8):
                called, _ = find_library_call(launch)
                read = {a.tensor for a in called.operands if a is not None}
                gemm = plain_gemm(called, fixed=not outside & read)
            if family is not None or gemm is not None:
                self.table.launches[i] = QueuedLaunch(**facts_of(launch), family=family, gemm=gemm)

    def at(self, dims: Sequence[int]) -> Iterator[LaunchJob]:
        """Yield the launches' jobs at one shape, in order."""
        sizes = self.executable.values.compile(self.executable.dims)(*dims)
        for i, family in self.families.items():
            launch = self.assembly.launches[i]
            for part in family.pick(sizes):
                if isinstance(part.job, Job) and 0 not in part.grid:
                    yield LaunchJob(_launch_of(launch, part.which), self.adapt(part.job))

    def expected_jobs(self, example_dims: Sequence[int]) -> list[Job]:
        """Return the jobs for the shapes expected at run time, within the token range."""
        names = self.executable.dims
        evaluate = self.executable.values.compile(names)
        dims, served = [*expected_dims(names)], self.executable.token_range
        if self.steps is not None:
            dims = [*expected_steps(names, self.steps)]
        elif example_dims:
            dims = [tuple(example_dims), *dims]
        some = evaluate(*dims[0])
        shapes = [evaluate(*d) for d in dims if served is None or served.holds(d)]
        jobs: list[Any] = []
        for family in self.families.values():
            jobs += [part.job for sizes in shapes for part in family.pick(sizes)]
            if isinstance(family, (AttentionFamily, KernelFamily)):
                jobs += [job for sizes in shapes for job in family.expected(sizes)]
            if isinstance(family, GemmFamily):
                tokens = sizes_of([self.table.expression(family.tokens)])
                buckets = BUCKETS if served is None else served.buckets_of(tokens)
                jobs += family.expected(some, buckets)
        return list({id(job): job for job in jobs if job is not None}.values())

    def adapt(self, job: Job) -> Job:
        """Return a job with the options applied (PDL)."""
        return read_cells(make_dependent(job) if self._depends else job)


def _launch_of(launch: ir.Launch, which: str) -> ir.Launch:
    """Return the launch of a part: itself, or the k-th after the library's GEMM."""
    if not isinstance(launch, ir.GemmLaunch) or not which.startswith("end"):
        return launch
    _, ends = find_library_call(launch)
    return ends[int(which.removeprefix("end"))]


class CudaRuntime(CudaQueue):
    """Builds a program's kernels and queues its launches.

    sources: Triton source by kernel and tile. kernels: the launches' kernels.
    """

    def __init__(self, kernels: LaunchKernels, weights: Weights, device: Device) -> None:
        """Build nothing yet: see `build_expected`."""
        self.kernels, self.families = kernels, kernels.families
        weights.quantized, weights.read = kernels.integers, frozenset(kernels.executable.weights)
        self.sources: dict[str, str] = {}
        super().__init__(kernels.executable, kernels.in_order, weights, device)

    def _obtain(self, jobs: Sequence[Any]) -> Sequence[Any]:
        functions, compiled = self.device.load([self.kernels.adapt(j) for j in jobs])
        self.builds += compiled
        for job in jobs:
            tiles = "".join(f"_{name.lower()}{value}" for name, value in job.constexprs)
            self.sources[job.name + tiles] = job.source
        return functions


def build_expected(runtimes: Sequence[CudaRuntime], example_dims: Sequence[int]) -> None:
    """Build the expected kernels of a call's programs in parallel, before the first run."""
    first, jobs = runtimes[0], [r.kernels.expected_jobs(example_dims) for r in runtimes]
    # Together: kernels shared by programs are built once.
    new = [r.kernels.adapt(j) for r, own in zip(runtimes, jobs, strict=True) for j in own]
    together = {job.digest(): job for job in new}
    first.builds += first.device.load(list(together.values()))[1]
    for runtime, own in zip(runtimes, jobs, strict=True):
        runtime.load(own)


def expected_dims(dims: Sequence[str]) -> Iterable[tuple[int, ...]]:
    """Yield the shapes to build kernels for; the first dim and dims named _d0 are the batch."""
    for length in EXPECTED_LENGTHS:
        batch = 16 if length % 16 == 0 else 1
        yield tuple(batch if k == 0 or "_d0" in n else length for k, n in enumerate(dims))
