"""Program: runs one compiled call of a saved file from its tables; decides and compiles nothing.

In: the tables of `saved.describe`, the file's libraries, the weights. Out: the outputs of a call,
at any sizes the capture holds for, as `turbotx.program` would give them::

    dims = program.match([t.shape for t in tensors])      # None where the capture does not hold
    outputs = program.run(program.bind(dims), tensors)
"""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from turbotx.errors import IndexOutOfRangeError
from turbotx.memory.plan import Lifetime, Workload, align
from turbotx.memory.pool import ChunkPool
from turbotx.memory.restore import restore_planner
from turbotx.runtime.abi import LaunchRecord
from turbotx.runtime.weights import PackedWeight, Weights
from turbotx.saved.calls import decode_nodes
from turbotx.saved.native import Libraries
from turbotx.saved.steps import Run, Step, make_step, make_window
from turbotx.saved.values import compile_texts, decode_constant, decode_tree

MAX_SHAPES = 256


@dataclass(frozen=True)
class Binding:
    """A program at one shape: every size evaluated, every offset planned."""

    dims: tuple[int, ...]
    sizes: Any
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    nbytes: int
    shapes: tuple[tuple[int, ...], ...]


@dataclass
class _Execution:
    """The address table of one arena, which one call at a time uses, and what it is filled for."""

    table: Any
    binding: Binding | None = None
    base: int = 0
    version: int = -1
    kept: object = None


@dataclass(frozen=True)
class _Packing:
    """What a packed weight is made of: a window on a tensor, by strides."""

    tensor: str
    shape: Sequence[int]
    strides: Sequence[int]
    offset: int


class SavedProgram:
    """One compiled call."""

    def __init__(
        self, tables: Mapping[str, Any], libraries: Libraries, model: nn.Module,
        constants: Mapping[str, torch.Tensor], pool: ChunkPool,
    ) -> None:  # fmt: skip
        self.tables, self.dims, self.pool = tables, tuple(tables["dims"]), pool
        self.plans = 0
        self._lock = threading.Lock()
        self._bindings: OrderedDict[tuple[int, ...], Binding] = OrderedDict()
        self._executions: dict[int, _Execution] = {}
        self._matcher = _Matcher(tables, self.dims)
        self._evaluate = self._compile(tables["values"])
        self._requirements = self._compile([text for text, _ in tables["requirements"]])
        self._outputs = tables["outputs"]
        self._dtypes = [decode_constant(o["dtype"]) for o in self._outputs]
        self._shapes = self._compile([e for o in self._outputs for e in o["shape"]])
        self._plan_memory(tables["memory"])
        self._find_weights(tables["weights"], model, constants)
        self._load_launches(tables, libraries)
        self._leaves = [self._leaf(leaf) for leaf in tables["leaves"]]

    def _compile(self, texts: Sequence[str]) -> Callable[..., tuple[Any, ...]]:
        return compile_texts(texts, self.dims)

    def match(self, shapes: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
        """Return the dims of a call's shapes in order, None where the capture does not hold."""
        return self._matcher.match(shapes)

    def explain(self, shapes: Sequence[Sequence[int]]) -> str:
        """Return why `match` gives None."""
        return self._matcher.solve(shapes)[1]

    # --- set up from tables ---

    def _plan_memory(self, memory: Mapping[str, Any]) -> None:
        lifetimes = tuple(Lifetime(*x) for x in memory["lifetimes"])
        workload = Workload(lifetimes, tuple(memory["size_class"]), tuple(memory["names"]))
        self._planner = restore_planner(memory["planner"], workload, memory["orientations"])
        self._class_nbytes = self._compile(memory["class_nbytes"])
        self._planned = [name for name, _, _ in memory["planned"]]
        self._places = np.array([place for _, place, _ in memory["planned"]], dtype=np.int64)
        self._planned_slots = np.array([s for _, _, s in memory["planned"]], dtype=np.int64)

    def _find_weights(
        self, weights: Mapping[str, Any], model: nn.Module, constants: Mapping[str, torch.Tensor]
    ) -> None:
        nodes = decode_nodes(weights["prepared"])
        prepared = {name: nodes[name] for name in weights["prepared_names"]}
        self.weights = Weights(model, constants, weights["paths"], prepared)
        self._weight_slots: Mapping[str, int] = weights["slots"]
        self._packings = [
            (w["slot"], _Packing(w["tensor"], w["shape"], w["strides"], w["offset"]), w["options"])
            for w in weights["packed"]
        ]
        self._packed: dict[int, PackedWeight] = {}
        self._packed_version = 0

    def _load_launches(self, tables: Mapping[str, Any], libraries: Libraries) -> None:
        self._runtime = libraries.open(tables["libraries"]["runtime"])
        self._records = (LaunchRecord * max(1, len(tables["launches"])))()
        self._arrays: list[Any] = []
        self._steps: dict[int, Step] = {}
        for k, launch in enumerate(tables["launches"]):
            if "aten" in launch:
                self._steps[k] = make_step(launch["aten"], self.dims)
                continue
            record = self._records[k]
            function = getattr(
                libraries.open(tables["libraries"][launch["library"]]), launch["symbol"]
            )
            record.call = ctypes.cast(function, ctypes.c_void_p).value
            record.arg_count, record.size_count = len(launch["slots"]), len(launch["sizes"])
            for field in ("slots", "offsets", "sizes"):
                array = (ctypes.c_int32 * max(1, len(launch[field])))(*launch[field])
                setattr(record, field, array)
                self._arrays.append(array)

    def _leaf(self, leaf: Mapping[str, Any]) -> Callable[[Run], Any]:
        if "tensor" in leaf:
            name = leaf["tensor"]
            return lambda run: run.tensor(name)
        if "window" in leaf:
            return make_window(leaf["window"], self.dims)
        if "size" in leaf:
            evaluate = self._compile([leaf["size"]])
            return lambda run: evaluate(*run.dims)[0]
        constant = decode_constant(leaf["constant"])
        return lambda run: constant

    # --- calls ---

    def bind(self, dims: tuple[int, ...]) -> Binding:
        """Return the program at one shape; raise IndexOutOfRangeError where an index cannot fit."""
        with self._lock:
            binding = self._bindings.get(dims)
            if binding is not None:
                self._bindings.move_to_end(dims)
                return binding
            rows = zip(self._requirements(*dims), self.tables["requirements"], strict=True)
            for holds, (_, text) in rows:
                if holds < 0:
                    shown = ", ".join(f"{n}={v}" for n, v in zip(self.dims, dims, strict=True))
                    raise IndexOutOfRangeError(f"index out of range: {text} fails for {shown}")
            offsets, nbytes = self._planner.offsets(self._class_nbytes(*dims))
            self.plans += 1
            values = self._evaluate(*dims)
            sizes = (ctypes.c_int64 * max(1, len(values)))(*values)
            array = np.array(offsets, dtype=np.int64)[self._places]
            flat = iter(self._shapes(*dims))
            shapes = tuple(tuple(next(flat) for _ in o["shape"]) for o in self._outputs)
            binding = Binding(dims, sizes, array, align(max(nbytes, 1)), shapes)
            self._bindings[dims] = binding
            if len(self._bindings) > MAX_SHAPES:
                self._bindings.popitem(last=False)
            return binding

    def run(self, binding: Binding, tensors: Sequence[torch.Tensor]) -> Any:
        """Run on a call's tensors, in order; return the model's output."""
        self.weights.refresh()
        inputs = [t if t.is_contiguous() else t.contiguous() for t in tensors]
        rows = zip(binding.shapes, self._dtypes, strict=True)
        outputs = [torch.empty(shape, dtype=dtype) for shape, dtype in rows]
        named = {x["tensor"]: t for x, t in zip(self.tables["inputs"], inputs, strict=True)}
        named.update((o["name"], t) for o, t in zip(self._outputs, outputs, strict=True))
        with self.pool.lease(binding.nbytes) as arena:
            table = self._fill(arena, binding)
            for x, tensor in zip(self.tables["inputs"], inputs, strict=True):
                table[x["slot"]] = tensor.data_ptr()
            for o, tensor in zip(self._outputs, outputs, strict=True):
                table[o["slot"]] = tensor.data_ptr()
            offsets = dict(zip(self._planned, binding.offsets.tolist(), strict=True))
            run = Run(binding.dims, offsets, arena.tensor, named, self.weights.tensors)
            failed = self._execute(table, binding.sizes, run)
        if failed:
            launch = self.tables["launches"][(failed >> 32) - 1]
            name, limit = launch["checks"][(failed & 0xFFFFFFFF) - 1]
            raise IndexOutOfRangeError.of(name, limit, launch["name"], launch["source"])
        leaves = [leaf(run) for leaf in self._leaves]
        return decode_tree(self.tables["out"], leaves.__getitem__)

    def _fill(self, arena: Any, binding: Binding) -> Any:
        """Return the arena's address table, with planned memory and weights in it."""
        execution = self._executions.get(id(arena))
        if execution is None:
            table = (ctypes.c_int64 * self.tables["slot_count"])()
            execution = self._executions[id(arena)] = _Execution(table)
        if execution.binding is not binding or execution.base != arena.data_ptr:
            addresses = binding.offsets + arena.data_ptr
            np.ctypeslib.as_array(execution.table)[self._planned_slots] = addresses
            execution.binding, execution.base = binding, arena.data_ptr
        if execution.version != self.weights.version:
            self._fill_weights(execution)
        return execution.table

    def _fill_weights(self, execution: _Execution) -> None:
        with self._lock:
            version, tensors = self.weights.version, self.weights.tensors
            if self._packed_version != version:
                self._packed = {
                    slot: PackedWeight(self._runtime, self.weights.window(made), *options)  # type: ignore[arg-type]
                    for slot, made, options in self._packings
                }
                self._packed_version = version
            packed = self._packed
        for name, slot in self._weight_slots.items():
            execution.table[slot] = tensors[name].data_ptr()
        for slot, weight in packed.items():
            execution.table[slot] = weight.address
        execution.version, execution.kept = version, (tensors, packed)

    def _execute(self, table: Any, sizes: Any, run: Run) -> int:
        records, addresses = ctypes.addressof(self._records), ctypes.addressof(table)
        for begin, end in self.tables["segments"]:
            step = self._steps.get(begin)
            if step is not None:
                step(run)
                continue
            values = ctypes.addressof(sizes)
            failed = self._runtime.ttx_run(records, begin, end, addresses, values, None)
            if failed:
                return int(failed)
        return 0


class _Matcher:
    """Solves a call's shapes for the dims, and checks what tracing assumed of them."""

    def __init__(self, tables: Mapping[str, Any], dims: Sequence[str]) -> None:
        self._dims, self._inputs = dims, tables["inputs"]
        self._sizes = compile_texts([s["text"] for x in self._inputs for s in x["sizes"]], dims)
        self._guards = compile_texts([condition for condition, _ in tables["guards"]], dims)
        self._texts = [text for _, text in tables["guards"]]

    def match(self, shapes: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
        dims, failed = self.solve(shapes)
        return None if failed else dims

    def solve(self, shapes: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], str]:
        found: dict[str, int] = {}
        places = [
            (f"{x['name']}.shape[{d}]", size, actual)
            for x, shape in zip(self._inputs, shapes, strict=True)
            for d, (size, actual) in enumerate(zip(x["sizes"], shape, strict=True))
        ]
        # A size that is a dim itself says it without doubt; those that only contain one come after.
        for place, size, actual in sorted(places, key=lambda p: p[1]["text"] not in self._dims):
            name, slope, rest = size.get("solve", (None, 1, 0))
            if name is None or name in found:
                continue
            if slope == 0 or (actual - rest) % slope:
                return (), f"{place} is {actual}, which is no {size['text']}"
            found[name] = (actual - rest) // slope
        if set(found) != set(self._dims):
            return (), f"{', '.join(set(self._dims) - set(found))} does not follow from the inputs"
        dims = tuple(found[name] for name in self._dims)
        for (place, size, actual), expected in zip(places, self._sizes(*dims), strict=True):
            if actual != expected:
                return (), f"{place} is {actual}, not {size['text']} = {expected}"
        for holds, text in zip(self._guards(*(max(2, x) for x in dims)), self._texts, strict=True):
            if not holds:
                return (), f"{text} does not hold"
        return dims, ""
