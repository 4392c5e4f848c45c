"""Program: launches over planned buffers; runs them, decides nothing.

In: an assembly, a runtime for its device, a planner and a pool of chunks. Out: the outputs of a
call. A new shape evaluates sizes and offsets once (`bind`); nothing is compiled for it::

    binding = program.bind((batch, seq))      # tens of microseconds, kept for the next call
    outputs = program.run(binding, tensors)   # no allocation but the outputs'
"""

from __future__ import annotations

import ctypes
import threading
from collections import ChainMap, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import sympy
import torch

from turbotx import ir
from turbotx.assemble import Assembly
from turbotx.errors import IndexOutOfRangeError
from turbotx.memory import Plan, make_planner
from turbotx.memory.liveness import LaunchUse, analyze
from turbotx.memory.plan import align
from turbotx.memory.pool import ChunkPool, poison, poison_enabled
from turbotx.runtime.aten import RunState, is_whole, make_window
from turbotx.runtime.cpu import CpuRuntime
from turbotx.runtime.cuda import CudaRuntime
from turbotx.runtime.watch import Watch
from turbotx.sizes import Expr, compile_evaluator, to_python


@dataclass(frozen=True)
class Binding:
    """A program at one shape: every size evaluated, every offset planned."""

    dims: tuple[int, ...]
    sizes: Any
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    footprint_nbytes: int
    outputs: tuple[tuple[int, tuple[int, ...], torch.dtype], ...]


class Execution:
    """The address table of one arena; one call at a time uses it."""

    def __init__(self, count: int) -> None:
        self.table = (ctypes.c_int64 * count)()
        self.numbers = np.ctypeslib.as_array(self.table)
        self.binding: Binding | None = None
        self.base = 0
        self.weights_version = -1
        self.kept: object = None


class _Poisoner:
    """The watch of poisoned runs: fills what nobody reads again."""

    def __init__(self, program: Program, binding: Binding, arena: Any) -> None:
        self._dying_after, self._arena = program.liveness.dying_after, arena
        self._offsets = dict(zip(program.planned, binding.offsets.tolist(), strict=True))
        self._nbytes = program.sizes_at(binding.dims)

    def before(self, launch: int, state: Callable[[], RunState]) -> None:
        pass

    def after(self, launch: int, state: Callable[[], RunState]) -> None:
        for name in self._dying_after(launch):
            begin = self._offsets[name]
            poison(self._arena.tensor[begin : begin + self._nbytes[name]])


class Program:
    """One captured call, compiled for one device."""

    def __init__(
        self, assembly: Assembly, dims: Sequence[str], runtime: CpuRuntime | CudaRuntime,
        pool: ChunkPool, planner: str, max_shapes: int,
    ) -> None:  # fmt: skip
        self.assembly, self.dims = assembly, tuple(dims)
        self.runtime, self.pool = runtime, pool
        self.plans = self.graph_captures = 0
        self._max_shapes = max_shapes
        self._bindings: OrderedDict[tuple[int, ...], Binding] = OrderedDict()
        self._executions: dict[int, Execution] = {}
        self._lock = threading.Lock()
        self._plan_memory(planner)
        table = runtime.table
        self._evaluate = compile_evaluator(list(table.values), self.dims)
        requirements = dict.fromkeys(assembly.requirements)
        self._requirements = [(compile_evaluator([e], self.dims), text) for e, text in requirements]
        self._outputs = [t for t in assembly.tensors.values() if t.kind == "output"]
        shapes = [extent for t in self._outputs for extent in t.shape]
        self._output_shapes = compile_evaluator(shapes, self.dims)
        self._inputs = [n for n, t in assembly.tensors.items() if t.kind == "input"]
        self._input_slots = [table.slots[n] for n in self._inputs]
        self._leaves = [self._leaf(leaf) for leaf in assembly.outputs]

    # --- memory ---

    def _plan_memory(self, kind: str) -> None:
        self.planner_kind = kind
        tensors = self.assembly.tensors
        outside = [n for n, t in tensors.items() if t.kind != "intermediate"]
        uses = [
            LaunchUse(x.name, x.reads, x.writes, inplace=x.inplace) for x in self.assembly.launches
        ]
        sizes = {n: to_python(t.nbytes) for n, t in tensors.items()}
        self.liveness = analyze(uses, outside=outside, size_of=sizes)
        roots = self.liveness.names
        place = {root: k for k, root in enumerate(roots)}
        self.planned = list(self.liveness.root_of)  # with the tensors that took over a root
        self._root_places = np.array([place[r] for r in self.liveness.root_of.values()], np.int64)
        classes: dict[Expr, int] = {}
        self.size_classes = of = [
            classes.setdefault(tensors[n].nbytes, len(classes)) for n in roots
        ]
        self._class_nbytes = compile_evaluator(list(classes), self.dims)
        seed, samples = self._expected_sizes()
        self.planner = make_planner(kind, self.liveness.lifetimes, of, roots, seed, samples)
        slots = self.runtime.table.slots
        self._planned_slots = np.array([slots[n] for n in self.planned], dtype=np.int64)

    def _expected_sizes(self) -> tuple[list[int], list[list[int]]]:
        """Sizes at shapes to expect: the planner is tuned to these, and safe for all others."""
        expected = [(1, 16), (1, 128), (4, 64), (8, 128), (16, 512), (1, 512)]
        rows = []
        for batch, seq in expected:
            dims = [batch if k == 0 or "_d0" in n else seq for k, n in enumerate(self.dims)]
            rows.append([max(1, x) for x in self._class_nbytes(*dims)])
        return rows[3], rows

    def plan(self, dims: Sequence[int]) -> Plan:
        """Return the full memory plan at these dims, for reports."""
        return self.planner.plan(self._class_nbytes(*dims))

    def reserve(self, binding: Binding) -> None:
        """Map the memory of a shape now, for good."""
        self.pool.reserve(binding.footprint_nbytes)

    # --- binding ---

    def bind(self, dims: tuple[int, ...]) -> Binding:
        """Return the program at one shape; raise IndexOutOfRangeError where an index cannot fit."""
        with self._lock:
            binding = self._bindings.get(dims)
            if binding is not None:
                self._bindings.move_to_end(dims)
                return binding
            for holds, text in self._requirements:
                if holds(*dims)[0] < 0:
                    shown = ", ".join(f"{n}={v}" for n, v in zip(self.dims, dims, strict=True))
                    raise IndexOutOfRangeError(f"index out of range: {text} fails for {shown}")
            offsets, footprint = self.planner.offsets(self._class_nbytes(*dims))
            self.plans += 1
            values = self._evaluate(*dims)
            sizes = (ctypes.c_int64 * max(1, len(values)))(*values)
            array = np.array(offsets, dtype=np.int64)[self._root_places]
            binding = Binding(dims, sizes, array, align(max(footprint, 1)), self._shapes(dims))
            self._bindings[dims] = binding
            if len(self._bindings) > self._max_shapes:
                self._bindings.popitem(last=False)
            return binding

    def _shapes(
        self, dims: tuple[int, ...]
    ) -> tuple[tuple[int, tuple[int, ...], torch.dtype], ...]:
        sizes = iter(self._output_shapes(*dims))
        slots = self.runtime.table.slots
        return tuple(
            (slots[t.name], tuple(next(sizes) for _ in t.shape), t.dtype) for t in self._outputs
        )

    # --- running ---

    def run(
        self, binding: Binding, tensors: Sequence[torch.Tensor], ticks: Any = None,
        watch: Watch | None = None,
    ) -> list[Any]:  # fmt: skip
        """Run on `tensors`, in the captured order; return the leaves of the model's output.

        `ticks`: int64, two a launch, takes the nanoseconds at which it began and ended. `watch`
        is told of every launch, which then run one by one.
        """
        self.runtime.weights.refresh()
        inputs, outputs = self._readable(tensors), self._new_outputs(binding)
        with self.pool.lease(binding.footprint_nbytes) as arena:
            execution = self._prepare(arena, binding)
            named = self._run_in(arena, execution, binding, inputs, outputs, ticks, watch)
        return [leaf(binding, named) for leaf in self._leaves]

    def _readable(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return inputs as kernels take them."""
        return [t if t.is_contiguous() else t.contiguous() for t in tensors]

    def _new_outputs(self, binding: Binding) -> list[torch.Tensor]:
        device = self.runtime.torch_device
        return [torch.empty(s, dtype=dtype, device=device) for _, s, dtype in binding.outputs]

    def _run_in(
        self, arena: Any, execution: Execution, binding: Binding, inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor], ticks: Any = None, watch: Watch | None = None,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """Run every launch in an arena; return inputs and outputs by name."""
        table = execution.table
        for slot, tensor in zip(self._input_slots, inputs, strict=True):
            table[slot] = tensor.data_ptr()
        for (slot, _, _), tensor in zip(binding.outputs, outputs, strict=True):
            table[slot] = tensor.data_ptr()
        named = dict(zip(self._inputs, inputs, strict=True))
        named.update((t.name, x) for t, x in zip(self._outputs, outputs, strict=True))
        state = partial(self._state, binding, arena, named)
        watches = [watch] if watch is not None else []
        if poison_enabled():
            watches.append(_Poisoner(self, binding, arena))
        failed = self.runtime.run(table, binding.sizes, state, ticks, watches)
        if failed:
            self._explain_failure(failed)
        return named

    def sizes_at(self, dims: Sequence[int]) -> dict[str, int]:
        """Return the bytes of every planned buffer at these dims."""
        sizes = self._class_nbytes(*dims)
        return dict(zip(self.liveness.names, (sizes[c] for c in self.size_classes), strict=True))

    def _state(self, binding: Binding, arena: Any, named: dict[str, torch.Tensor]) -> RunState:
        offsets = dict(zip(self.planned, binding.offsets.tolist(), strict=True))
        tensors = ChainMap(named, self.runtime.weights.tensors)
        return RunState(binding.dims, offsets, arena.tensor, tensors)

    def _prepare(self, arena: Any, binding: Binding) -> Execution:
        """Return the arena's address table, set for this shape and these weights."""
        execution = self._executions.get(id(arena))
        if execution is None:
            execution = self._executions[id(arena)] = Execution(len(self.runtime.table.slots))
        self._point(execution, arena, binding)
        return execution

    def _point(self, execution: Execution, arena: Any, binding: Binding) -> None:
        """Set an address table for this memory, this shape and these weights."""
        base = arena.data_ptr
        if execution.binding is not binding or execution.base != base:
            execution.numbers[self._planned_slots] = binding.offsets + base
            execution.binding, execution.base = binding, base
        if execution.weights_version != self.runtime.weights.version:
            filled = self.runtime.fill_weights(execution.table)
            execution.weights_version, execution.kept = filled

    def _leaf(self, leaf: Any) -> Callable[[Binding, dict[str, torch.Tensor]], Any]:
        """Return how to make one leaf of the output: a tensor, a view of one, or a value."""
        if isinstance(leaf, ir.Operand):
            tensor = self.assembly.tensors[leaf.tensor]
            return self._tensor_leaf(leaf, tensor)
        if isinstance(leaf, sympy.Expr):
            evaluate = compile_evaluator([leaf], self.dims)
            return lambda binding, named: evaluate(*binding.dims)[0]
        return lambda binding, named: leaf

    def _tensor_leaf(
        self, leaf: ir.Operand, tensor: ir.Tensor
    ) -> Callable[[Binding, dict[str, torch.Tensor]], Any]:
        whole = is_whole(leaf, tensor)
        window = make_window(leaf, self.dims)

        def make(binding: Binding, named: dict[str, torch.Tensor]) -> torch.Tensor:
            base = named.get(leaf.tensor)
            if base is None:
                base = self.runtime.weights.tensors[leaf.tensor]
            return base if whole else window(binding.dims, base)

        return make

    def _explain_failure(self, failed: int) -> None:
        launch = self.assembly.launches[(failed >> 32) - 1]
        name, limit = self.checks_of(launch)[(failed & 0xFFFFFFFF) - 1]
        raise IndexOutOfRangeError.of(name, limit, launch.name, launch.source)

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
