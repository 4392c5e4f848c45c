"""Program: launches over planned buffers; runs them, decides nothing.

In: an assembly, a runtime for its device, a planner and a pool of chunks. Out: the outputs of a
call. A new shape evaluates sizes and offsets once (`bind`); nothing is compiled for it::

    binding = program.bind((batch, seq))      # tens of microseconds, kept for the next call
    outputs = program.run(binding, tensors)   # no allocation but the outputs'
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import sympy

from turbotx import ir
from turbotx.capture.eager import Alias
from turbotx.ir.expr import Expr, compile_evaluator, to_python
from turbotx.memory.liveness import LaunchUse, Liveness, analyze
from turbotx.memory.planner import Plan, make_planner
from turbotx.memory.planner.plan import Planner
from turbotx.memory.pool import ChunkPool, poison, poison_enabled
from turbotx.program.assemble import Assembly
from turbotx.runtime.aten import AtenSteps, is_whole, window_of
from turbotx.runtime.cpu.runtime import CpuRuntime
from turbotx.runtime.cuda.dispatch import Share
from turbotx.runtime.cuda.runtime import CudaRuntime
from turbotx.runtime.executable import Binding, Formulas, Output, Places, PlannedCall, make_size
from turbotx.runtime.inplace_watch import InplaceWatch, Place, Reuse
from turbotx.runtime.state import Evaluate, Maker, RunState
from turbotx.runtime.watch import Watch


class _Poisoner:
    """The watch of poisoned runs: fills what nobody reads again."""

    def __init__(self, program: Program, binding: Binding) -> None:
        self._dying_after = program.liveness.dying_after
        self._nbytes = program.sizes_at(binding.dims)

    def before(self, launch: int, state: RunState) -> None:
        pass

    def after(self, launch: int, state: RunState) -> None:
        for name in self._dying_after(launch):
            begin = state.offsets[name]
            poison(state.arena[begin : begin + self._nbytes[name]])


class Program(PlannedCall):
    """One captured call, compiled for one device."""

    def __init__(
        self, assembly: Assembly, dims: Sequence[str], runtime: CpuRuntime | CudaRuntime,
        pool: ChunkPool, planner: str, max_shapes: int,
    ) -> None:  # fmt: skip
        self.assembly, self.runtime, self.planner_kind = assembly, runtime, planner
        self.liveness, self.size_classes, classes = _analyze(assembly)
        names, tensors = tuple(dims), assembly.tensors.values()
        self._class_nbytes = compile_evaluator(classes, names)
        slots = runtime.table.slots
        outputs = [t for t in tensors if t.kind == "output"]
        requirements = list(dict.fromkeys(assembly.requirements))
        place = {root: k for k, root in enumerate(self.liveness.names)}
        formulas = Formulas(
            dims=names,
            values=compile_evaluator(list(runtime.table.values), names),
            class_nbytes=self._class_nbytes,
            requirements=compile_evaluator([e for e, _ in requirements], names),
            requirement_texts=[text for _, text in requirements],
            output_extents=compile_evaluator([e for t in outputs for e in t.shape], names),
        )
        places = Places(
            inputs=[(t.name, slots[t.name]) for t in tensors if t.kind == "input"],
            outputs=[Output(t.name, slots[t.name], len(t.shape), t.dtype) for t in outputs],
            # With the tensors that took over a root's memory.
            planned=[(n, place[root], slots[n]) for n, root in self.liveness.root_of.items()],
            orders=[assembly.orders.get(t.name) for t in tensors if t.kind == "input"],
            raw=frozenset(assembly.raw),
        )
        made = self._make_planner(names)
        super().__init__(formulas, places, made, runtime, pool, max_shapes)
        self._leaves = [self._leaf(leaf) for leaf in assembly.outputs]

    # --- memory ---

    def _make_planner(self, dims: Sequence[str]) -> Planner:
        found = self.liveness
        seed, samples = _expected_sizes(
            self._class_nbytes, max(self.size_classes, default=-1) + 1, dims
        )
        return make_planner(
            self.planner_kind, found.lifetimes, self.size_classes, found.names, seed, samples
        )

    def plan(self, dims: Sequence[int]) -> Plan:
        """Return the full memory plan at these dims, for reports."""
        return self.planner.plan(self._class_nbytes(*dims))

    def sizes_at(self, dims: Sequence[int]) -> dict[str, int]:
        """Return the bytes of every planned buffer at these dims."""
        sizes = self._class_nbytes(*dims)
        return dict(zip(self.liveness.names, (sizes[c] for c in self.size_classes), strict=True))

    # --- running ---

    @property
    def share(self) -> Share | None:
        """Which calls it serves; None: all of them."""
        return self.runtime.share

    def serves(self, dims: Sequence[int]) -> bool:
        """Tell whether it, and not its twin, is to run at these dims."""
        return self.share is None or self.share.holds(dims)

    def _own_watches(self, table: Any, binding: Binding) -> Sequence[Watch]:
        if not poison_enabled():
            return []
        runtime, poisoner = self.runtime, _Poisoner(self, binding)
        if not isinstance(runtime, CpuRuntime):
            return [poisoner]
        repeat = partial(runtime.repeat, table=table, sizes=binding.sizes)
        return [InplaceWatch(self._reuses(binding.dims), table, repeat), poisoner]

    def _reuses(self, dims: Sequence[int]) -> dict[int, Reuse]:
        """Return the launches that write over what they read, by index."""
        slots, nbytes, root = self.runtime.table.slots, self.sizes_at(dims), self.liveness.root_of
        taken = self.liveness.reused

        def place(name: str) -> Place:
            return Place(name, slots[name], nbytes[root[name]] if name in root else 0)

        found = {}
        for i, launch in enumerate(self.assembly.launches):
            lost = [place(read) for written, read in taken if written in launch.writes]
            if lost:
                found[i] = Reuse(launch.name, lost, [place(n) for n in launch.writes])
        return found

    def _leaf(self, leaf: Any) -> Maker:
        """Return how to make one leaf of the output: a tensor, a view of one, or a value."""
        if isinstance(leaf, ir.Operand):
            if is_whole(leaf, self.assembly.tensors[leaf.tensor]):
                return lambda state: state.whole(leaf.tensor, leaf.dtype)
            return window_of(leaf, self.dims)
        if isinstance(leaf, Alias):
            return AtenSteps(self.dims).alias(leaf)
        if isinstance(leaf, sympy.Basic):
            return make_size(compile_evaluator([leaf], self.dims))
        if isinstance(leaf, set):  # the caller may change what it gets
            return lambda state: set(leaf)
        return lambda state: leaf

    def _check_of(self, launch: int, check: int) -> tuple[str, str, str, str]:
        failed = self.assembly.launches[launch]
        return *self.checks_of(failed)[check], failed.name, failed.source

    def checks_of(self, launch: ir.Launch) -> list[tuple[str, str]]:
        """Return what a kernel checks: tensors whose values must lie in [0, limit), and limits."""
        if not isinstance(launch, ir.KernelLaunch):
            return []
        kernel = launch.kernel
        made = {r: s for s in kernel.body for r in ir.results_of(s)}
        found = []
        for check in kernel.body:
            if not isinstance(check, ir.Check):
                continue
            name, source = check.value, made[check.value]
            if isinstance(source, ir.Load):
                position = [p.name for p in kernel.params].index(source.access.param)
                name = launch.args[position].tensor
            found.append((name, str(check.limit)))
        return found


def _analyze(assembly: Assembly) -> tuple[Liveness, list[int], list[Expr]]:
    """Return who lives when, the size class of every root, and the classes' bytes."""
    tensors = assembly.tensors
    outside = [n for n, t in tensors.items() if t.kind != "intermediate"]
    uses = [
        LaunchUse(x.name, x.reads, x.writes, x.workspaces, x.inplace) for x in assembly.launches
    ]
    sizes = {n: to_python(t.nbytes) for n, t in tensors.items()}
    found = analyze(uses, outside=outside, size_of=sizes)
    classes: dict[Expr, int] = {}
    of = [classes.setdefault(tensors[n].nbytes, len(classes)) for n in found.names]
    return found, of, list(classes)


def _expected_sizes(
    class_nbytes: Evaluate, count: int, dims: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Sizes at shapes to expect: the planner is tuned to these, and safe for all others."""
    expected = [(1, 16), (1, 128), (4, 64), (8, 128), (16, 512), (1, 512)]
    rows = []
    for batch, seq in expected:
        shape = [batch if k == 0 or "_d0" in n else seq for k, n in enumerate(dims)]
        try:
            rows.append([max(1, x) for x in class_nbytes(*shape)])
        except (ArithmeticError, ValueError):  # no size that this model takes: it divides by zero
            continue
    if not rows:  # sizes that are as good as any
        rows = [[1 << (k % 8 + 8) for k in range(count)]]
    return rows[min(3, len(rows) - 1)], rows
