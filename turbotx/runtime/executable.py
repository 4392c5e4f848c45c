"""Planned: one compiled call over planned memory, at any shape; sizes come as plain functions.

In: the functions that evaluate its sizes, where its tensors lie in the table of addresses, a
planner, a runtime and a pool of chunks. Out: bindings and runs. `runtime.program` makes one from
stages, `turbotx.saved` from a file, without symbolic algebra::

    binding = call.bind((batch, seq))      # tens of microseconds, kept for the next call
    leaves = call.run(binding, tensors)    # no allocation but the outputs'
"""

from __future__ import annotations

import ctypes
import operator
import threading
from abc import ABC, abstractmethod
from collections import ChainMap, OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from turbotx.capture.ambient import without_autocast
from turbotx.errors import IndexOutOfRangeError, InputError
from turbotx.ir.memory_order import in_memory
from turbotx.memory.planner.plan import Planner, align
from turbotx.memory.pool import ChunkPool
from turbotx.runtime.state import Evaluate, Maker, RunState
from turbotx.runtime.watch import Watch
from turbotx.runtime.weights import Weights

STEPS = 64
"""What sizes that grow with every call are rounded up to, for a plan that serves so many calls."""


@dataclass(frozen=True)
class Formulas:
    """A call's sizes, as functions of its dims in order.

    values: what kernels read. class_nbytes: the planner's size classes. requirements: negative
    where an index cannot fit, each with its words. output_extents: of all outputs, one after
    the other.
    """

    dims: tuple[str, ...]
    values: Evaluate
    class_nbytes: Evaluate
    requirements: Evaluate
    requirement_texts: Sequence[str]
    output_extents: Evaluate


@dataclass(frozen=True)
class Output:
    """A tensor that every call makes anew, and its place in the table of addresses."""

    name: str
    slot: int
    rank: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Places:
    """Where a call's tensors lie in the table of addresses.

    inputs: (name, slot). planned: (name, which of the planner's offsets, slot). orders: of each
    input's dims in memory, None where it is their own. raw: inputs that must be dense.
    """

    inputs: Sequence[tuple[str, int]]
    outputs: Sequence[Output]
    planned: Sequence[tuple[str, int, int]]
    orders: Sequence[Sequence[int] | None]
    raw: Collection[str]


@dataclass(frozen=True)
class Binding:
    """A call at one shape: every size evaluated, every offset planned.

    offsets: in the order of `Places.planned`, and offset_of by name. outputs: slot, shape, dtype.
    """

    dims: tuple[int, ...]
    sizes: Any
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    offset_of: dict[str, int]
    footprint_nbytes: int
    outputs: tuple[tuple[int, tuple[int, ...], torch.dtype], ...]


class Execution:
    """The address table of one arena; one call at a time uses it."""

    def __init__(self, count: int) -> None:
        self.table = (ctypes.c_int64 * count)()
        self.numbers = np.ctypeslib.as_array(self.table)
        self.offsets: Any = None  # of the binding that the table is set for
        self.base = 0
        self.weights_version = -1
        self.kept: Any = None


class Runtime(Protocol):
    """What runs a call's launches."""

    weights: Weights
    torch_device: torch.device

    @property
    def slot_count(self) -> int:
        """How many addresses its table holds."""

    def fill_weights(self, table: Any) -> tuple[int, object]:
        """Write the addresses of everything made from parameters into a table.

        Returns their version, and what must be kept alive as long as the table is used.
        """

    def run(
        self, table: Any, sizes: Any, state: RunState,
        ticks: Any = None, watches: Sequence[Watch] = (),
    ) -> int:  # fmt: skip
        """Run every launch in order; return 0, or (launch + 1) << 32 | the check that failed."""


class PlannedCall(ABC):
    """One captured call, compiled for one device; thread-safe. Subclasses set `_leaves`."""

    _leaves: Sequence[Maker]

    def __init__(
        self, formulas: Formulas, places: Places, planner: Planner, runtime: Runtime,
        pool: ChunkPool, max_shapes: int,
    ) -> None:  # fmt: skip
        self.dims, self.pool, self.planner = formulas.dims, pool, planner
        self.plans = self.graph_captures = 0
        self._formulas, self._places, self._runtime = formulas, places, runtime
        self._max_shapes = max_shapes
        self._is_ordered = any(order is not None for order in places.orders)
        self._root_places = np.array([k for _, k, _ in places.planned], dtype=np.int64)
        self._planned_slots = np.array([s for _, _, s in places.planned], dtype=np.int64)
        self._bindings: OrderedDict[tuple[int, ...], Binding] = OrderedDict()
        self._blocks: dict[tuple[int, ...], tuple[Binding, Sequence[int]]] = {}
        self._executions: dict[int, Execution] = {}
        self._lock = threading.Lock()

    # --- binding ---

    def bind(self, dims: tuple[int, ...]) -> Binding:
        """Return the call at one shape; raise IndexOutOfRangeError where an index cannot fit."""
        with self._lock:
            binding = self._bindings.get(dims)
            if binding is not None:
                self._bindings.move_to_end(dims)
                return binding
            self._require(dims)
            binding = self._bindings[dims] = self._plan_shape(dims)
            if len(self._bindings) > self._max_shapes:
                self._bindings.popitem(last=False)
            return binding

    def bind_step(self, dims: tuple[int, ...], stepping: Sequence[int]) -> Binding:
        """Return the call at one shape, planned once for all shapes that come to the same where
        the `stepping` dims, by place, are rounded up to a multiple of STEPS.

        Raises IndexOutOfRangeError as `bind` does.
        """
        above = list(dims)
        for k in stepping:
            above[k] = -(-above[k] // STEPS) * STEPS
        block = tuple(above)
        nbytes = self._formulas.class_nbytes
        with self._lock:
            found = self._blocks.get(block)
            if found is None:
                found = self._blocks[block] = self._plan_shape(block), nbytes(*block)
                if len(self._blocks) > self._max_shapes:
                    self._blocks.pop(next(iter(self._blocks)))
        planned, most = found
        if any(map(operator.gt, nbytes(*dims), most)):  # a size that shrinks as others grow
            return self.bind(dims)
        self._require(dims)
        return replace(
            planned, dims=dims, sizes=self._sizes_at(dims), outputs=self._shapes_at(dims)
        )

    def _require(self, dims: tuple[int, ...]) -> None:
        rest = self._formulas.requirements(*dims)
        for value, text in zip(rest, self._formulas.requirement_texts, strict=True):
            if value < 0:
                shown = ", ".join(f"{n}={v}" for n, v in zip(self.dims, dims, strict=True))
                raise IndexOutOfRangeError(f"index out of range: {text} fails for {shown}")

    def _plan_shape(self, dims: tuple[int, ...]) -> Binding:
        offsets, footprint = self.planner.offsets(self._formulas.class_nbytes(*dims))
        self.plans += 1
        array = np.array(offsets, dtype=np.int64)[self._root_places]
        names = (name for name, _, _ in self._places.planned)
        offset_of = dict(zip(names, array.tolist(), strict=True))
        footprint = align(max(footprint, 1))
        sizes, outputs = self._sizes_at(dims), self._shapes_at(dims)
        return Binding(dims, sizes, array, offset_of, footprint, outputs)

    def _sizes_at(self, dims: tuple[int, ...]) -> Any:
        values = self._formulas.values(*dims)
        return (ctypes.c_int64 * max(1, len(values)))(*values)

    def _shapes_at(self, dims: tuple[int, ...]) -> tuple[tuple[int, Any, torch.dtype], ...]:
        extents = iter(self._formulas.output_extents(*dims))
        return tuple(
            (o.slot, tuple(next(extents) for _ in range(o.rank)), o.dtype)
            for o in self._places.outputs
        )

    def reserve(self, binding: Binding) -> None:
        """Map the memory of a shape now, for good."""
        self.pool.reserve(binding.footprint_nbytes)

    # --- running ---

    def run(
        self, binding: Binding, tensors: Sequence[torch.Tensor], ticks: Any = None,
        watch: Watch | None = None,
    ) -> list[Any]:  # fmt: skip
        """Run on `tensors`, in the captured order; return the leaves of the model's output.

        `ticks`: int64, two a launch, takes the nanoseconds at which it began and ended. `watch`
        is told of every launch, which then run one by one. Autocast's casts are launches of the
        program where it was traced under it: nothing here is cast again.
        """
        with without_autocast():
            self._runtime.weights.refresh()
            inputs = self._readable(self.in_memory(tensors))
            outputs = self._new_outputs(binding)
            with self.pool.lease(binding.footprint_nbytes) as arena:
                execution = self._prepare(arena, binding)
                state = self._state(binding, arena, inputs, outputs, tensors)
                self._run_in(execution, binding, state, inputs, outputs, ticks, watch)
            return [leaf(state) for leaf in self._leaves]

    def in_memory(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return inputs by the order of their dims in memory, for which the call was captured.

        Raises InputError where one is read past its elements, and they are not dense.
        """
        if self._is_ordered:
            tensors = list(map(in_memory, tensors, self._places.orders))
        if self._places.raw:
            self._refuse_slices(tensors)
        return tensors

    def _refuse_slices(self, tensors: Sequence[torch.Tensor]) -> None:
        for (name, _), tensor in zip(self._places.inputs, tensors, strict=True):
            dense = tensor.is_contiguous() and tensor.storage_offset() == 0
            if name in self._places.raw and not dense:
                raise InputError(
                    f"the model reads the memory of {name!r} by strides of its own (as_strided) "
                    "or asks how it lies (is_contiguous, stride, storage_offset), and this one "
                    f"is a part of a larger tensor: pass {name}.clone()"
                )

    def _readable(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return inputs as kernels take them: row-major, and each element as it is in memory, where
        PyTorch may have only noted that it is to be negated or conjugated."""
        return [
            t if t.is_contiguous() and not (t.is_neg() or t.is_conj()) else _settle(t)
            for t in tensors
        ]

    def _new_outputs(self, binding: Binding) -> list[torch.Tensor]:
        device = self._runtime.torch_device
        return [torch.empty(s, dtype=dtype, device=device) for _, s, dtype in binding.outputs]

    def _state(
        self, binding: Binding, arena: Any, inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor], given: Sequence[torch.Tensor] = (),
    ) -> RunState:  # fmt: skip
        """given: the inputs as they came, where leaves are to be made that may be these."""
        places = self._places
        named = {name: x for (name, _), x in zip(places.inputs, inputs, strict=True)}
        named.update((o.name, x) for o, x in zip(places.outputs, outputs, strict=True))
        tensors = ChainMap(named, self._runtime.weights.tensors)
        own = {name: x for (name, _), x in zip(places.inputs, given, strict=False)}
        return RunState(binding.dims, binding.offset_of, arena.tensor, tensors, own)

    def _run_in(
        self, execution: Execution, binding: Binding, state: RunState,
        inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor],
        ticks: Any = None, watch: Watch | None = None,
    ) -> None:  # fmt: skip
        """Run every launch in the arena of a table."""
        table = execution.table
        for (_, slot), tensor in zip(self._places.inputs, inputs, strict=True):
            table[slot] = tensor.data_ptr()
        for (slot, _, _), tensor in zip(binding.outputs, outputs, strict=True):
            table[slot] = tensor.data_ptr()
        watches = [*([] if watch is None else [watch]), *self._own_watches(table, binding)]
        failed = self._runtime.run(table, binding.sizes, state, ticks, watches)
        if failed:
            self._explain_failure(failed)

    def _own_watches(self, table: Any, binding: Binding) -> Sequence[Watch]:
        """Return what is to be told of every launch over a table of addresses, whoever calls."""
        return ()

    def _prepare(self, arena: Any, binding: Binding) -> Execution:
        """Return the arena's address table, set for this shape and these weights."""
        execution = self._executions.get(id(arena))
        if execution is None:
            execution = self._executions[id(arena)] = Execution(self._runtime.slot_count)
        self._point(execution, arena, binding)
        return execution

    def _point(self, execution: Execution, arena: Any, binding: Binding) -> None:
        """Set an address table for this memory, this shape and these weights."""
        base = arena.data_ptr
        if execution.offsets is not binding.offsets or execution.base != base:
            execution.numbers[self._planned_slots] = binding.offsets + base
            execution.offsets, execution.base = binding.offsets, base
        if execution.weights_version != self._runtime.weights.version:
            filled = self._runtime.fill_weights(execution.table)
            execution.weights_version, execution.kept = filled

    def _explain_failure(self, failed: int) -> None:
        raise IndexOutOfRangeError.of(
            *self._check_of((failed >> 32) - 1, (failed & 0xFFFFFFFF) - 1)
        )

    @abstractmethod
    def _check_of(self, launch: int, check: int) -> tuple[str, str, str, str]:
        """Return a check's tensor, limit, launch and source."""


def _settle(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous()


def make_size(evaluate: Evaluate) -> Callable[[RunState], Any]:
    """Return a function that gives the one value of a size in one run."""
    return lambda state: evaluate(*state.dims)[0]
