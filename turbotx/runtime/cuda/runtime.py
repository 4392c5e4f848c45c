"""The GPU runtime: the kernels of an assembly's launches, and how they are queued on a device.

In: an assembly and a target; then weights and a device. Out: the jobs of any shape, which need no
device; and something that runs launches over an address table, as the CPU runtime does: nothing is
allocated, and nothing waits for the device::

    LaunchKernels(assembly, ("batch", "seq"), tiles).at((1, 40))    # [LaunchJob(launch, job), ...]
    failed = runtime.run(table, sizes, state)   # 0, or which launch met an index out of range
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from turbotx import ir
from turbotx.ir.expr import compile_evaluator
from turbotx.kernels.gemm_heuristics import BUCKETS, MOST_TURNS
from turbotx.kernels.job import Job
from turbotx.kernels.schedule_selector import Tiles
from turbotx.kernels.triton.dependent import can_depend, make_dependent
from turbotx.kernels.triton.gemm_template import GemmTemplate
from turbotx.kernels.tuned import make_chooser
from turbotx.program.assemble import Assembly
from turbotx.runtime.aten import AtenSteps
from turbotx.runtime.cuda.arguments import ArgumentLayout, Key
from turbotx.runtime.cuda.dispatch import TokenRange
from turbotx.runtime.cuda.gemm import GemmFamily, bind_gemm, find_library_call
from turbotx.runtime.cuda.library_gemm import Call
from turbotx.runtime.cuda.queue import CudaQueue, Queued
from turbotx.runtime.cuda.variants import AttentionFamily, KernelFamily, SizeTable, lay_out
from turbotx.runtime.device import Device
from turbotx.runtime.state import RunState, Step
from turbotx.runtime.weights import Weights

# Sequence lengths whose kernels are built before the first run: below and at the edges of the
# tiles for run-time lengths, with and without sizes that allow 128-bit accesses.
EXPECTED_LENGTHS = (16, 17, 256, 250, 512, 500)

Compiling = KernelFamily | AttentionFamily | GemmFamily


@dataclass(frozen=True)
class LaunchJob:
    """A kernel that a launch takes; a launch whose part PyTorch runs has none for that.

    launch: that of the program, or among those that stand for it (`Launch.instead`).
    """

    launch: ir.Launch
    job: Job


class LaunchKernels:
    """Which kernels the launches of a program take on a GPU, at any shape; no GPU is needed.

    tokens: the calls that the program serves; None: all. families: by launch; none without
    generated kernels. layouts: where the arguments of each kernel lie. checks: how many a launch
    makes. depends: kernels wait by themselves for those before them.
    """

    def __init__(
        self, assembly: Assembly, dims: Sequence[str], tiles: Tiles,
        tokens: TokenRange | None = None, generated: bool = True, pdl: bool = True,
    ) -> None:  # fmt: skip
        """generated: False where PyTorch runs everything. pdl: the option."""
        self.assembly, self.dims, self.tokens = assembly, tuple(dims), tokens
        self.target = tiles.target
        self.depends = pdl and can_depend(self.target)
        self.table = SizeTable(list(assembly.tensors))
        self.layouts: dict[Key, ArgumentLayout] = {}
        self.checks: dict[int, int] = {}
        self._kernels: dict[str, KernelFamily] = {}
        self._shared: dict[object, GemmFamily] = {}
        self.families = self._find_families(tiles) if generated else {}

    def _find_families(self, tiles: Tiles) -> dict[int, Compiling]:
        found: dict[int, Compiling] = {}
        left_by: dict[str, GemmTemplate] = {}
        target = self.target
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
                    self.layouts[i, which] = layout
        return found

    def _kernel(self, i: int, which: str, launch: ir.Launch) -> KernelFamily:
        """Return the family of a generated kernel, with its arguments laid out."""
        kernel = launch.target
        assert isinstance(kernel, ir.Kernel)
        digest = kernel.digest()
        if digest not in self._kernels:
            self._kernels[digest] = KernelFamily(kernel, self.target, self.table, self._choose)
        self._lay_out(i, which, launch)
        return self._kernels[digest]

    def _lay_out(self, i: int, which: str, launch: ir.Launch) -> None:
        body = launch.target.body if isinstance(launch.target, ir.Kernel) else ()
        checks = sum(isinstance(s, ir.Check) for s in body)
        self.checks[i] = max(checks, self.checks.get(i, 0))
        operands = [a for a in launch.args if a is not None]
        sizes = [self.table.value(e) for e in launch.sizes]
        self.layouts[i, which] = lay_out(operands, "status" if checks else "", sizes, self.table)

    def at(self, dims: Sequence[int]) -> Iterator[LaunchJob]:
        """Give what the launches take at one shape, in their order."""
        sizes = compile_evaluator(list(self.table.values), self.dims)(*dims)
        for i, family in self.families.items():
            launch = self.assembly.launches[i]
            for part in family.pick(sizes):
                if isinstance(part.job, Job):
                    yield LaunchJob(_launch_of(launch, part.which), self.adapt(part.job))

    def expected_jobs(self, example_dims: Sequence[int]) -> list[Job]:
        """Return what the shapes to expect will need, of the calls that it serves."""
        evaluate = compile_evaluator(list(self.table.values), self.dims)
        first = [tuple(example_dims)] if example_dims else []
        dims, tokens = [*first, *expected_dims(self.dims)], self.tokens
        some = evaluate(*dims[0])
        shapes = [evaluate(*d) for d in dims if tokens is None or tokens.holds(d)]
        jobs: list[Any] = []
        for family in self.families.values():
            jobs += [part.job for sizes in shapes for part in family.pick(sizes)]
            if isinstance(family, AttentionFamily):
                jobs += [job for sizes in shapes for job in family.expected(sizes)]
            if isinstance(family, GemmFamily):
                counted = self.table.expression(family.tokens)
                buckets = BUCKETS if tokens is None else tokens.buckets_of(counted)
                jobs += family.expected(some, buckets)
        return list({id(job): job for job in jobs if job is not None}.values())

    def adapt(self, job: Job) -> Job:
        """Return a job as the options want it."""
        return make_dependent(job) if self.depends else job


def _launch_of(launch: ir.Launch, which: str) -> ir.Launch:
    """Return the launch that a part of one is: itself, or the k-th behind the library's GEMM."""
    if not which.startswith("end"):
        return launch
    _, ends = find_library_call(launch)
    return ends[int(which.removeprefix("end"))]


class CudaRuntime(CudaQueue):
    """Builds a program's kernels and queues its launches.

    sources: the Triton source by kernel and tile. kernels: which launches take which.
    """

    def __init__(self, kernels: LaunchKernels, weights: Weights, device: Device) -> None:
        """`build_expected` builds what they need."""
        self.kernels, self.assembly = kernels, kernels.assembly
        self.table, self.families, self.tokens = kernels.table, kernels.families, kernels.tokens
        self.sources: dict[str, str] = {}
        gemms, steps = self._find_calls(kernels.dims)
        split = any(layout.cell == "turns" for layout in kernels.layouts.values())
        tensors, slots, kinds = self.assembly.tensors, self.table.slots, ("parameter", "prepared")
        queued = Queued(
            self.families, kernels.layouts, gemms, steps,
            [kernels.checks.get(i, 0) for i in range(len(self.assembly.launches))],
            {n: slots[n] for n, t in tensors.items() if t.kind in kinds}, len(slots),
            len(self.table.values), MOST_TURNS if split else 0, kernels.depends,
        )  # fmt: skip
        super().__init__(device, weights, queued)

    def _find_calls(
        self, dims: Sequence[str]
    ) -> tuple[dict[int, tuple[Callable[[RunState], Call], bool]], dict[int, Step]]:
        """Return what PyTorch runs: the library's GEMMs, and all that has no kernel."""
        steps, tensors = AtenSteps(dims), self.assembly.tensors
        outside = {n for n, t in tensors.items() if t.kind in ("input", "output")}
        gemms, others = {}, {}
        for i, launch in enumerate(self.assembly.launches):
            if launch.kind == "gemm" and not launch.target.folds:  # type: ignore[attr-defined]
                called, _ = find_library_call(launch)
                fixed = not outside & {a.tensor for a in called.args if a is not None}
                gemms[i] = (bind_gemm(called, steps), fixed)
            elif i not in self.families:
                others[i] = steps.make(launch)
        return gemms, others

    def _obtain(self, jobs: Sequence[Any]) -> Sequence[Any]:
        functions, compiled = self.device.load([self.kernels.adapt(j) for j in jobs])
        self.builds += compiled
        for job in jobs:
            tiles = "".join(f"_{name.lower()}{value}" for name, value in job.constexprs)
            self.sources[job.name + tiles] = job.source
        return functions


def build_expected(runtimes: Sequence[CudaRuntime], example_dims: Sequence[int]) -> None:
    """Build what programs of one call will need, in parallel and before the first run."""
    first, jobs = runtimes[0], [r.kernels.expected_jobs(example_dims) for r in runtimes]
    # All at once: what a device has loaded costs the second program nothing.
    new = [r.kernels.adapt(j) for r, own in zip(runtimes, jobs, strict=True) for j in own]
    together = {job.digest(): job for job in new}
    first.builds += first.device.load(list(together.values()))[1]
    for runtime, own in zip(runtimes, jobs, strict=True):
        runtime.load(own)


def expected_dims(dims: Sequence[str]) -> Iterable[tuple[int, ...]]:
    """Shapes for which kernels are built ahead; the first dim is the batch, as are others' _d0."""
    for length in EXPECTED_LENGTHS:
        batch = 16 if length % 16 == 0 else 1
        yield tuple(batch if k == 0 or "_d0" in n else length for k, n in enumerate(dims))
