"""Program: binds an executable to planned memory at any shape, and runs it.

In: an executable, a runtime for its device and a pool of chunks. Out: the outputs of a call. For a
new shape, sizes and offsets are evaluated once (`bind`) and nothing is compiled. Used for compiled
and for loaded models::

    binding = program.bind((batch, seq))      # tens of microseconds, cached for the next call
    outputs = program.run(binding, tensors)   # allocates only the outputs
"""

from __future__ import annotations

import ctypes
import logging
import operator
import threading
from collections import ChainMap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from turbotx.capture.ambient import without_autocast
from turbotx.errors import IndexOutOfRangeError, InputError
from turbotx.ir.memory_order import has_dense_strides, in_memory
from turbotx.ir.sizes import Evaluate, Sizes
from turbotx.memory.liveness import Liveness
from turbotx.memory.planner.plan import Plan, align
from turbotx.memory.pool import ChunkPool, poison, poison_enabled
from turbotx.program.executable import Executable, TokenRange
from turbotx.runtime.aten import make_leaf
from turbotx.runtime.binding import Binding, Execution, NamedOffsets, Runtime
from turbotx.runtime.cpu.executor import CpuExecutor
from turbotx.runtime.inplace_watch import InplaceWatch, Reuse, TensorSlot
from turbotx.runtime.lru import LruDict
from turbotx.runtime.state import RunState
from turbotx.runtime.watch import Watch

log = logging.getLogger("turbotx.memory")

STEPS = 64
"""Growing sizes are rounded up to multiples of this, so that one plan serves this many calls."""


class _Poisoner:
    """Watch for poisoned runs: fills memory with NaN after its last use."""

    def __init__(self, program: Program, binding: Binding) -> None:
        self._dying_after = program.liveness.dying_after
        self._nbytes = program.sizes_at(binding.dims)

    def before(self, launch: int, state: RunState) -> None:
        pass

    def after(self, launch: int, state: RunState) -> None:
        for name in self._dying_after(launch):
            begin = state.offsets[name]
            poison(state.arena[begin : begin + self._nbytes[name]])


class Program:
    """One captured call, or a range of its shapes, on one device; thread-safe.

    plans: number of shapes planned.
    graph_captures: number of CUDA graphs captured.
    """

    def __init__(
        self, executable: Executable, runtime: Runtime, pool: ChunkPool, max_shapes: int
    ) -> None:
        self.executable, self.runtime, self.pool = executable, runtime, pool
        self.plans = self.graph_captures = 0
        x, memory, self.dims = executable, executable.memory, executable.dims
        found = memory.liveness
        self.planner = memory.restore_planner()
        self._values, self._class_nbytes = (
            sizes.compile(self.dims) for sizes in (x.values, memory.class_nbytes)
        )
        self._requirements = x.requirements.compile(self.dims)
        self._inputs = [(t.name, x.slots[t.name]) for t in x.inputs]
        self._orders = [t.order for t in x.inputs]
        self._raw = {k: t for k, t in enumerate(x.inputs) if t.raw}
        self._outputs = [(t, x.slots[t.name], t.shape.compile(self.dims)) for t in x.outputs]
        self._names = [*(t.name for t in x.inputs), *(t.name for t in x.outputs)]
        place = {root: k for k, root in enumerate(found.names)}
        # Includes the tensors that share a root's memory.
        planned = [(place[root], x.slots[name]) for name, root in found.root_of.items()]
        self._root_places = np.array([k for k, _ in planned], dtype=np.int64)
        self._planned_slots = np.array([slot for _, slot in planned], dtype=np.int64)
        self._leaves = [make_leaf(leaf, self.dims) for leaf in x.leaves]
        self._is_ordered = any(order is not None for order in self._orders)
        self._bindings: LruDict[tuple[int, ...], Binding] = LruDict(max_shapes)
        self._blocks: LruDict[tuple[int, ...], tuple[Binding, Sequence[int]]] = LruDict(max_shapes)
        self._moved: dict[tuple[int, ...], tuple[list[int], Evaluate]] = {}
        self.executions: dict[int, Execution] = {}
        self._lock = threading.Lock()

    @property
    def liveness(self) -> Liveness:
        """Lifetimes of the tensors in the arena."""
        return self.executable.memory.liveness

    @property
    def token_range(self) -> TokenRange | None:
        """The calls that it serves; None for all."""
        return self.executable.token_range

    def serves(self, dims: Sequence[int]) -> bool:
        """Return whether this specialization of a call serves these dims."""
        return self.token_range is None or self.token_range.holds(dims)

    def effective_dims(self, dims: Sequence[int]) -> Sequence[int]:
        """Return the dims that a call with these dims runs with: the same, except for packed
        programs."""
        return dims

    # --- binding ---

    def bind(self, dims: tuple[int, ...]) -> Binding:
        """Return the call at one shape; raise IndexOutOfRangeError if an index cannot fit."""
        with self._lock:
            binding = self._bindings.find(dims)
            if binding is None:
                self._require(dims)
                binding = self._bindings[dims] = self._plan_shape(dims)
            return binding

    def bind_step(self, dims: tuple[int, ...], stepping: Sequence[int]) -> Binding:
        """Return the call at one shape, sharing a plan between shapes that are equal after rounding
        up the `stepping` dims (by index) to a multiple of STEPS.

        Raises IndexOutOfRangeError as `bind` does.
        """
        above = list(dims)
        for k in stepping:
            above[k] = -(-above[k] // STEPS) * STEPS
        block = tuple(above)
        with self._lock:
            found = self._blocks.find(block)
            if found is None:
                found = self._plan_shape(block), self._class_nbytes(*block)
                self._blocks[block] = found
        planned, most = found
        if any(map(operator.gt, self._class_nbytes(*dims), most)):
            return self.bind(dims)  # some size shrinks as others grow
        self._require(dims)
        places, values = self._moving(tuple(stepping))
        sizes = type(planned.sizes).from_buffer_copy(planned.sizes)
        for place, value in zip(places, values(*dims), strict=True):
            sizes[place] = value
        return Binding(
            dims, sizes, planned.offsets, planned.offset_of, planned.footprint_nbytes,
            self._shapes_of(dims),
        )  # fmt: skip

    def _moving(self, stepping: tuple[int, ...]) -> tuple[list[int], Evaluate]:
        """Return which sizes change with these dims, by place, and a function of them."""
        known = self._moved.get(stepping)
        if known is None:
            values = self.executable.values
            places = values.that_use([self.dims[k] for k in stepping])
            some = Sizes(tuple(values.texts[k] for k in places)).compile(self.dims)
            known = self._moved[stepping] = places, some
        return known

    def _require(self, dims: tuple[int, ...]) -> None:
        rest = self._requirements(*dims)
        for value, text in zip(rest, self.executable.requirement_texts, strict=True):
            if value < 0:
                shown = ", ".join(f"{n}={v}" for n, v in zip(self.dims, dims, strict=True))
                raise IndexOutOfRangeError(f"index out of range: {text} fails for {shown}")

    def _plan_shape(self, dims: tuple[int, ...]) -> Binding:
        offsets, footprint = self.planner.offsets(self._class_nbytes(*dims))
        self.plans += 1
        if log.isEnabledFor(logging.DEBUG):
            shape = ", ".join(f"{n} {v}" for n, v in zip(self.dims, dims, strict=True))
            log.debug("planned %d buffers at %s: %d bytes", len(offsets), shape, footprint)
        array = np.array(offsets, dtype=np.int64)[self._root_places]
        offset_of = NamedOffsets(self.liveness.root_of, array)
        sizes, outputs = self._sizes_of(dims), self._shapes_of(dims)
        return Binding(dims, sizes, array, offset_of, align(max(footprint, 1)), outputs)

    def _sizes_of(self, dims: tuple[int, ...]) -> Any:
        values = self._values(*dims)
        return (ctypes.c_int64 * max(1, len(values)))(*values)

    def _shapes_of(self, dims: tuple[int, ...]) -> tuple[tuple[int, Any, torch.dtype], ...]:
        return tuple((slot, shape(*dims), t.dtype) for t, slot, shape in self._outputs)

    def plan(self, dims: Sequence[int]) -> Plan:
        """Return the full memory plan at these dims, for reports."""
        return self.planner.plan(self._class_nbytes(*dims))

    def sizes_at(self, dims: Sequence[int]) -> dict[str, int]:
        """Return the bytes of every planned buffer at these dims."""
        sizes, memory = self._class_nbytes(*dims), self.executable.memory
        return dict(zip(self.liveness.names, (sizes[c] for c in memory.size_class), strict=True))

    def reserve(self, binding: Binding) -> None:
        """Map the memory of a shape now, permanently."""
        self.pool.reserve(binding.footprint_nbytes)

    # --- running ---

    def run(
        self, binding: Binding, tensors: Sequence[torch.Tensor], ticks: Any = None,
        watch: Watch | None = None,
    ) -> list[Any]:  # fmt: skip
        """Run on `tensors`, in captured order; return the leaves of the model's output.

        ticks: int64, two per launch, receives the nanoseconds at which each began and ended.
        watch: called around every launch; launches then run one by one. Casts of autocast are
        launches of the program if it was traced under it; none are made here.
        """
        with without_autocast():
            self.runtime.weights.refresh()
            inputs = self._readable(self.in_memory(tensors))
            outputs = self._new_outputs(binding)
            with self.pool.lease(binding.footprint_nbytes) as arena:
                execution = self._prepare(arena, binding)
                state = self._state(binding, arena, inputs, outputs, tensors)
                self._run_in(execution, binding, state, inputs, outputs, ticks, watch)
            return [leaf(state) for leaf in self._leaves]

    def in_memory(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return the inputs permuted to the memory order for which the call was captured.

        Raises InputError if an input is not dense though the model reads its memory by strides, or
        has a stride that the trace did not see though the model asks for it.
        """
        if self._is_ordered:
            tensors = list(map(in_memory, tensors, self._orders))
        if self._raw:
            self._refuse_slices(tensors)
        return tensors

    def _refuse_slices(self, tensors: Sequence[torch.Tensor]) -> None:
        for k, given in self._raw.items():
            name, tensor = given.name, tensors[k]
            if not (tensor.is_contiguous() and tensor.storage_offset() == 0):
                raise InputError(
                    f"the model reads the memory of {name!r} by strides of its own (as_strided) "
                    "or asks how it lies (is_contiguous, stride, storage_offset), and this one "
                    f"is a part of a larger tensor: pass {name}.clone()"
                )
            if given.exact and not has_dense_strides(tensor):
                raise InputError(
                    f"the model asks for the strides of {name!r}, and this one, of size "
                    f"{list(tensor.shape)}, has the strides {list(tensor.stride())}: those of dims "
                    "of size 1 tell only what it is a part of. Pass "
                    f"{name}.clone(memory_format=torch.contiguous_format)"
                )

    def _readable(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return inputs as kernels take them: contiguous, and with pending negation or conjugation
        resolved."""
        return [
            t if t.is_contiguous() and not (t.is_neg() or t.is_conj()) else _settle(t)
            for t in tensors
        ]

    def _new_outputs(self, binding: Binding) -> list[torch.Tensor]:
        device = self.runtime.torch_device
        return [torch.empty(s, dtype=dtype, device=device) for _, s, dtype in binding.outputs]

    def _state(
        self, binding: Binding, arena: Any, inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor], given: Sequence[torch.Tensor] = (),
    ) -> RunState:  # fmt: skip
        """given: the original inputs, for outputs that may alias them."""
        named = dict(zip(self._names, (*inputs, *outputs), strict=True))
        tensors = ChainMap(named, self.runtime.weights.tensors)
        own = dict(zip(self._names, given, strict=False))
        return RunState(binding.dims, binding.offset_of, arena.tensor, tensors, own)

    def _run_in(
        self, execution: Execution, binding: Binding, state: RunState,
        inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor],
        ticks: Any = None, watch: Watch | None = None,
    ) -> None:  # fmt: skip
        """Run all launches in the arena of an address table."""
        table = execution.table
        for (_, slot), tensor in zip(self._inputs, inputs, strict=True):
            table[slot] = tensor.data_ptr()
        for (slot, _, _), tensor in zip(binding.outputs, outputs, strict=True):
            table[slot] = tensor.data_ptr()
        watches = [*([] if watch is None else [watch]), *self._debug_watches(table, binding)]
        failed = self.runtime.run(table, binding.sizes, state, ticks, watches)
        if failed:
            self._explain_failure(failed)

    def _debug_watches(self, table: Any, binding: Binding) -> Sequence[Watch]:
        """Return the debugging watches of a run over an address table; empty unless TURBOTX_POISON
        is set."""
        if not poison_enabled():
            return []
        poisoner = _Poisoner(self, binding)
        if not isinstance(self.runtime, CpuExecutor):
            return [poisoner]
        repeat = partial(self.runtime.repeat, table=table, sizes=binding.sizes)
        return [InplaceWatch(self._reuses(binding.dims), table, repeat), poisoner]

    def _reuses(self, dims: Sequence[int]) -> dict[int, Reuse]:
        """Return the launches that write over memory they read, by index."""
        slots, nbytes, root = self.executable.slots, self.sizes_at(dims), self.liveness.root_of

        def place(name: str) -> TensorSlot:
            return TensorSlot(name, slots[name], nbytes[root[name]] if name in root else 0)

        found = {}
        for i, launch in enumerate(self.executable.launches):
            taken = self.liveness.reused
            lost = [place(read) for written, read in taken if written in launch.writes]
            if lost:
                found[i] = Reuse(launch.name, lost, [place(n) for n in launch.writes])
        return found

    def _prepare(self, arena: Any, binding: Binding) -> Execution:
        """Return the arena's address table, set for this shape and these weights."""
        execution = self.executions.get(id(arena))
        if execution is None:
            execution = self.executions[id(arena)] = Execution(len(self.executable.slots))
        self._point(execution, arena, binding)
        return execution

    def _point(self, execution: Execution, arena: Any, binding: Binding) -> None:
        """Set an address table for this arena, shape and weights."""
        base = arena.data_ptr
        if execution.offsets is not binding.offsets or execution.base != base:
            execution.numbers[self._planned_slots] = binding.offsets + base
            execution.offsets, execution.base = binding.offsets, base
        if execution.weights_version != self.runtime.weights.version:
            filled = self.runtime.fill_weights(execution.table)
            execution.weights_version, execution.kept = filled

    def _explain_failure(self, failed: int) -> None:
        launch = self.executable.launches[(failed >> 32) - 1]
        tensor, limit = launch.checks[(failed & 0xFFFFFFFF) - 1]
        raise IndexOutOfRangeError.of(tensor, limit, launch.name, launch.source)


def _settle(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous()


Run = Callable[[Any, Any, Sequence[torch.Tensor], Watch | None], tuple[list[Any], Sequence[int]]]
"""Runs a program on a binding and tensors; returns the outputs and the sizes of the call."""


def run_bound(
    program: Program, binding: Any, tensors: Sequence[torch.Tensor], watch: Watch | None = None
) -> tuple[list[Any], Sequence[int]]:
    """Run a call of the sizes that it is bound to."""
    return program.run(binding, tensors, watch=watch), binding.dims
