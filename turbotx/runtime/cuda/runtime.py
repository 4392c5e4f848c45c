"""The GPU runtime: an assembly's launches compiled to kernels, and queued as `CudaQueue` does.

In: an assembly, the program's weights and a device. Out: its executable, and something that runs it
over an address table; nothing is allocated, and nothing waits for the device::

    failed = runtime.run(table, sizes, state)   # 0, or which launch met an index out of range
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from turbotx import ir
from turbotx.ir.expr import sizes_of
from turbotx.kernels.gemm_heuristics import BUCKETS, MOST_TURNS
from turbotx.kernels.job import Job
from turbotx.kernels.triton.dependent import can_depend, make_dependent
from turbotx.kernels.triton.gemm_template import GemmTemplate
from turbotx.kernels.tuned import make_chooser
from turbotx.options import Options
from turbotx.program.assembly import Assembly
from turbotx.program.executable import ArgumentLayout, GpuTables, QueuedLaunch, Share
from turbotx.program.link import Layout, facts_of, link
from turbotx.runtime.cuda.arguments import Key
from turbotx.runtime.cuda.dispatch import make_tiles
from turbotx.runtime.cuda.gemm import GemmFamily, find_library_call, plain_gemm
from turbotx.runtime.cuda.queue import CudaQueue
from turbotx.runtime.cuda.variants import AttentionFamily, KernelFamily, lay_out
from turbotx.runtime.device import Device
from turbotx.runtime.weights import Weights

# Sequence lengths whose kernels are built before the first run: below and at the edges of the
# tiles for run-time lengths, with and without sizes that allow 128-bit accesses.
EXPECTED_LENGTHS = (16, 17, 256, 250, 512, 500)

Compiling = KernelFamily | AttentionFamily | GemmFamily


class CudaRuntime(CudaQueue):
    """Compiles a program's kernels and queues its launches.

    sources: the Triton source by kernel and tile.
    """

    def __init__(
        self, assembly: Assembly, weights: Weights, options: Options, dims: Sequence[str],
        device: Device, share: Share | None = None,
    ) -> None:  # fmt: skip
        """share: the calls that it serves; None: all. `build_expected` builds what they need."""
        self.assembly, self.device, self.share = assembly, device, share
        self.sources: dict[str, str] = {}
        self.table = Layout({name: k for k, name in enumerate(assembly.tensors)}, share=share)
        self._layouts: dict[Key, ArgumentLayout] = {}
        self._checks: dict[int, int] = {}
        self._kernels: dict[str, KernelFamily] = {}
        self._shared: dict[object, GemmFamily] = {}
        self.families = self._find_families(options)
        families = list({id(f): f for f in self.families.values()}.values())
        self._lay_out_launches({id(f): k for k, f in enumerate(families)})
        split = any(layout.cell == "turns" for layout in self._layouts.values())
        self.table.gpu = GpuTables(
            device.target,
            tuple((i, which, layout) for (i, which), layout in self._layouts.items()),
            tuple(self._checks.get(i, 0) for i in range(len(assembly.launches))),
            MOST_TURNS if split else 0,
            options.pdl and can_depend(device.target),
        )
        self.executable = link(assembly, dims, options.planner, self.table)
        super().__init__(self.executable, families, weights, device)

    # --- kernels ---

    def _find_families(self, options: Options) -> dict[int, Compiling]:
        if options.backend == "aten":
            return {}
        found: dict[int, Compiling] = {}
        left_by: dict[str, GemmTemplate] = {}
        target, tiles = self.device.target, make_tiles(options, self.device)
        self._choose = make_chooser(tiles.overrides, target, tiles.tuned)
        for i, launch in enumerate(self.assembly.launches):
            if isinstance(launch, ir.KernelLaunch):
                found[i] = self._kernel(i, "kernel", launch)
            elif isinstance(launch, (ir.AttentionLaunch, ir.ProductLaunch)):
                found[i] = AttentionFamily(launch, target, self.table, tiles)
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
        """Return the family of a generated kernel, with its arguments laid out."""
        kernel = launch.kernel
        digest = kernel.digest()
        if digest not in self._kernels:
            target = self.device.target
            self._kernels[digest] = KernelFamily(kernel, target, self.table, self._choose)
        self._lay_out(i, which, launch)
        return self._kernels[digest]

    def _lay_out(self, i: int, which: str, launch: ir.Launch) -> None:
        body = launch.kernel.body if isinstance(launch, ir.KernelLaunch) else ()
        checks = sum(isinstance(s, ir.Check) for s in body)
        self._checks[i] = max(checks, self._checks.get(i, 0))
        operands = [a for a in launch.operands if a is not None]
        sizes = [self.table.value(e) for e in launch.sizes]
        self._layouts[i, which] = lay_out(operands, "status" if checks else "", sizes, self.table)

    def _lay_out_launches(self, number: Mapping[int, int]) -> None:
        """Lay out what kernels and the library run. number: of each family, by its identity."""
        tensors = self.assembly.tensors
        outside = {n for n, t in tensors.items() if t.kind in ("input", "output")}
        for i, launch in enumerate(self.assembly.launches):
            family, gemm = number.get(id(self.families.get(i))), None
            if isinstance(launch, ir.GemmLaunch) and not launch.gemm.folds:
                called, _ = find_library_call(launch)
                read = {a.tensor for a in called.operands if a is not None}
                gemm = plain_gemm(called, fixed=not outside & read)
            if family is not None or gemm is not None:
                self.table.launches[i] = QueuedLaunch(**facts_of(launch), family=family, gemm=gemm)

    def expected_jobs(self, example_dims: Sequence[int]) -> list[Job]:
        """Return what the shapes to expect will need, of the calls that it serves."""
        names = self.executable.dims
        evaluate = self.executable.values.compile(names)
        first = [tuple(example_dims)] if example_dims else []
        dims, share = [*first, *expected_dims(names)], self.share
        some = evaluate(*dims[0])
        shapes = [evaluate(*d) for d in dims if share is None or share.holds(d)]
        jobs: list[Any] = []
        for family in self.families.values():
            jobs += [part.job for sizes in shapes for part in family.pick(sizes)]
            if isinstance(family, AttentionFamily):
                jobs += [job for sizes in shapes for job in family.expected(sizes)]
            if isinstance(family, GemmFamily):
                tokens = sizes_of([self.table.expression(family.tokens)])
                buckets = BUCKETS if share is None else share.buckets_of(tokens)
                jobs += family.expected(some, buckets)
        return list({id(job): job for job in jobs if job is not None}.values())

    def _obtain(self, jobs: Sequence[Any]) -> Sequence[Any]:
        functions, compiled = self.device.load([self.adapt(j) for j in jobs])
        self.builds += compiled
        for job in jobs:
            tiles = "".join(f"_{name.lower()}{value}" for name, value in job.constexprs)
            self.sources[job.name + tiles] = job.source
        return functions

    def adapt(self, job: Job) -> Job:
        """Return a job as the options want it."""
        return make_dependent(job) if self.gpu.depends else job


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
