"""Program: launches over planned buffers; runs them, decides nothing.

In: an assembly, its planned memory, a runtime for its device and a pool of chunks. Out: the outputs
of a call. A new shape evaluates sizes and offsets once (`bind`); nothing is compiled for it::

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
from turbotx.ir.expr import compile_evaluator
from turbotx.memory.pool import ChunkPool, poison, poison_enabled
from turbotx.program.assemble import Assembly
from turbotx.program.plan_memory import PlannedMemory
from turbotx.runtime.aten import AtenSteps, is_whole, window_of
from turbotx.runtime.cpu.runtime import CpuRuntime
from turbotx.runtime.cuda.runtime import CudaRuntime
from turbotx.runtime.executable import Binding, Formulas, Output, Places, PlannedCall, make_size
from turbotx.runtime.inplace_watch import InplaceWatch, Place, Reuse
from turbotx.runtime.state import Maker, RunState
from turbotx.runtime.watch import Watch


class _Poisoner:
    """The watch of poisoned runs: fills what nobody reads again."""

    def __init__(self, program: Program, binding: Binding) -> None:
        self._dying_after = program.memory.liveness.dying_after
        self._nbytes = program.memory.sizes_at(binding.dims)

    def before(self, launch: int, state: RunState) -> None:
        pass

    def after(self, launch: int, state: RunState) -> None:
        for name in self._dying_after(launch):
            begin = state.offsets[name]
            poison(state.arena[begin : begin + self._nbytes[name]])


class Program(PlannedCall):
    """One captured call, compiled for one device."""

    def __init__(
        self, assembly: Assembly, dims: Sequence[str], memory: PlannedMemory,
        runtime: CpuRuntime | CudaRuntime, pool: ChunkPool, max_shapes: int,
    ) -> None:  # fmt: skip
        self.assembly, self.memory, self.runtime = assembly, memory, runtime
        names, tensors = tuple(dims), assembly.tensors.values()
        slots = runtime.table.slots
        outputs = [t for t in tensors if t.kind == "output"]
        requirements = list(dict.fromkeys(assembly.requirements))
        place = {root: k for k, root in enumerate(memory.liveness.names)}
        formulas = Formulas(
            dims=names,
            values=compile_evaluator(list(runtime.table.values), names),
            class_nbytes=memory.class_nbytes,
            requirements=compile_evaluator([e for e, _ in requirements], names),
            requirement_texts=[text for _, text in requirements],
            output_extents=compile_evaluator([e for t in outputs for e in t.shape], names),
        )
        places = Places(
            inputs=[(t.name, slots[t.name]) for t in tensors if t.kind == "input"],
            outputs=[Output(t.name, slots[t.name], len(t.shape), t.dtype) for t in outputs],
            # With the tensors that took over a root's memory.
            planned=[(n, place[root], slots[n]) for n, root in memory.liveness.root_of.items()],
            orders=[assembly.orders.get(t.name) for t in tensors if t.kind == "input"],
            raw=frozenset(assembly.raw),
        )
        super().__init__(formulas, places, memory.planner, runtime, pool, max_shapes)
        self._leaves = [self._leaf(leaf) for leaf in assembly.outputs]

    # --- running ---

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
        slots, memory = self.runtime.table.slots, self.memory
        nbytes, root = memory.sizes_at(dims), memory.liveness.root_of
        taken = memory.liveness.reused

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
        kernel = launch.target
        if not isinstance(kernel, ir.Kernel):
            return []
        made = {r: s for s in kernel.body for r in ir.results_of(s)}
        found = []
        for check in kernel.body:
            if not isinstance(check, ir.Check):
                continue
            name, source = check.value, made[check.value]
            if isinstance(source, ir.Load):
                position = [p.name for p in kernel.params].index(source.access.param)
                operand = launch.args[position]
                name = operand.tensor if operand is not None else name
            found.append((name, str(check.limit)))
        return found
