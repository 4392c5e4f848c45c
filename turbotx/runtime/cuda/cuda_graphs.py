"""CUDA graphs: a shape's first call runs launches one by one, later calls replay a graph.

In: an executable and the number of graphs to cache. Out: the same results. A graph reads and writes
only the arena: inputs are copied in, outputs are copied out to new tensors::

    [intermediates, as planned | input_ids | attention_mask | hidden states]   one arena, all graphs
"""

from __future__ import annotations

import math
import operator
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from turbotx.capture.ambient import without_autocast
from turbotx.errors import BuildWarning, DeviceError, InputError, TurbotxError, first_line
from turbotx.memory.planner.plan import align
from turbotx.memory.pool import ChunkPool, poison_enabled
from turbotx.program.executable import Executable, WholeTensor
from turbotx.runtime.binding import Binding, Execution
from turbotx.runtime.cuda.queue import CudaQueue
from turbotx.runtime.cuda.settings import math_settings
from turbotx.runtime.cuda.step_inputs import StepInputs, fit
from turbotx.runtime.cuda.weights import WeightsVersion
from turbotx.runtime.device import Graph, GraphRecorder
from turbotx.runtime.lru import LruDict
from turbotx.runtime.program import Program
from turbotx.runtime.state import RunState
from turbotx.runtime.watch import Watch

# The alignment of PyTorch's allocator, for cuBLAS and 128-bit accesses.
ALIGNMENT = 256


@dataclass(frozen=True)
class GraphBinding(Binding):
    """A call at one shape, with the arena offsets of its graph's inputs and outputs.

    outer: shapes and dtypes of inputs, then outputs. outer_offsets: their byte offsets, after the
    intermediates. graph_nbytes: bytes of the arena in all. key: the dims that the graph is cached
    by; for decoding steps those of a full cache. cells: this call's values in device memory.
    """

    outer: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    outer_offsets: tuple[int, ...]
    graph_nbytes: int
    key: tuple[int, ...]
    cells: tuple[int, ...] = ()


@dataclass(frozen=True)
class CapturedGraph:
    """A captured graph of one shape in one arena.

    stamp: addresses, weights version and settings at capture; the graph is invalid if they change.
    kept: keeps the weights it reads alive. arguments: its kernels' argument arrays and cells.
    """

    graph: Graph
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    stamp: object
    kept: WeightsVersion
    arguments: Any


class GraphCache:
    """LRU cache of graphs by arena and shape.

    used: recently seen shapes. recorders: one per arena, so that its graphs share temporary memory.
    packed: the programs over tokens that share it, the specializations of one call.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.used: LruDict[tuple[int, ...], None] = LruDict(4 * most)
        self.kept: LruDict[tuple[int, tuple[int, ...]], CapturedGraph] = LruDict(most)
        self.recorders: dict[int, GraphRecorder] = {}
        self.packed: list[Any] = []
        self.lock = threading.Lock()


class CudaGraphProgram(Program):
    """A program that runs launches one by one or replays a graph; thread-safe like `Program`."""

    runtime: CudaQueue

    def __init__(
        self, executable: Executable, runtime: CudaQueue, pool: ChunkPool, max_shapes: int,
        graphs: GraphCache,
    ) -> None:  # fmt: skip
        super().__init__(executable, runtime, pool, max_shapes)
        self.graphs = graphs
        self.callers_reads: dict[int, WeightsVersion] = {}
        """Weights that graphs of the caller's read, by version: nothing tells when those go."""
        self._shapes = [(t.shape.compile(self.dims), t.dtype) for t in executable.inputs]
        self._plain_leaves = self._find_plain_leaves()
        self._steps = StepInputs(executable)

    def _find_plain_leaves(self) -> list[int] | None:
        """Return each leaf's output index if all leaves are whole outputs, else None."""
        place = {t.name: k for k, (t, _, _) in enumerate(self._outputs)}
        leaves = self.executable.leaves
        if all(isinstance(x, WholeTensor) and x.name in place for x in leaves):
            return [place[x.name] for x in leaves]
        return None

    def _plan_shape(self, dims: tuple[int, ...]) -> Binding:
        plain = super()._plan_shape(dims)
        inputs = [(shape(*dims), dtype) for shape, dtype in self._shapes]
        if self._steps.cache is not None:  # the cache is not copied into the arena
            inputs[self._steps.cache] = (0,), inputs[self._steps.cache][1]
        outer = (*inputs, *((shape, dtype) for _, shape, dtype in plain.outputs))
        offsets, end = [], align(plain.footprint_nbytes, ALIGNMENT)
        for shape, dtype in outer:
            offsets.append(end)
            end = align(end + math.prod(shape) * dtype.itemsize, ALIGNMENT)
        known = {f.name: getattr(plain, f.name) for f in fields(plain)}
        return GraphBinding(
            **known, outer=outer, outer_offsets=tuple(offsets), graph_nbytes=end, key=dims
        )  # fmt: skip

    def bind(self, dims: tuple[int, ...]) -> Binding:
        """Return the call at one shape, as `Program.bind`; decoding steps share one plan, made for
        the cache's capacity."""
        return self._bind_step(dims) if self._steps.cells is not None else super().bind(dims)

    def bind_step(self, dims: tuple[int, ...], stepping: Sequence[int]) -> Binding:
        """Return the call at one shape, as `Program.bind_step`."""
        if self._steps.cells is not None:
            return self._bind_step(dims)
        return super().bind_step(dims, stepping)

    def _bind_step(self, dims: tuple[int, ...]) -> Binding:
        key = self._steps.key_of(dims)
        with self._lock:
            planned = self._bindings.find(key)
            if planned is None:
                planned = self._bindings[key] = self._plan_shape(key)
        self._require(dims)
        assert isinstance(planned, GraphBinding)
        if any(map(operator.gt, self._class_nbytes(*dims), self._class_nbytes(*key))):
            raise InputError(
                f"a step with a key/value cache takes more memory at a length of its own, {dims}, "
                f"than at the cache's capacity, {key}: call the model with use_cache=False"
            )
        outputs = self._shapes_of(dims)
        return replace(planned, dims=dims, outputs=outputs, cells=self._steps.values_at(dims))

    def run(
        self, binding: Binding, tensors: Sequence[torch.Tensor], ticks: Any = None,
        watch: Watch | None = None,
    ) -> list[Any]:  # fmt: skip
        """Run on `tensors`, see `Program.run`. Asynchronous: the device may not be finished on
        return."""
        if torch.is_inference_mode_enabled():  # cached views must not be inference tensors
            with torch.inference_mode(False), torch.no_grad():
                return self.run(binding, tensors, ticks, watch)
        device = self.runtime.device
        with without_autocast(), device.active():
            if device.is_capturing():
                return self._run_inside_capture(binding, tensors)
            plain = ticks is not None or watch is not None or poison_enabled()
            plain = plain or self.graphs.most == 0 or self._steps.is_bound
            assert plain or isinstance(binding, GraphBinding)
            if isinstance(binding, GraphBinding) and not plain and not self._is_first(binding.key):
                try:
                    return self._replay(binding, tensors)
                except _NotCapturable as error:
                    self.graphs.most = 0
                    warnings.warn(
                        f"launches run one by one, because they cannot be captured as a CUDA "
                        f"graph: {error}; cuda_graphs=False says so beforehand",
                        BuildWarning,
                        stacklevel=4,
                    )
            return super().run(binding, tensors, ticks, watch)

    def reserve(self, binding: Binding) -> None:
        """Map the memory of a shape and of its graph now."""
        assert isinstance(binding, GraphBinding)
        self.pool.reserve(binding.graph_nbytes if self.graphs.most else binding.footprint_nbytes)

    @contextmanager
    def used(
        self, binding: Binding, tensors: Sequence[torch.Tensor]
    ) -> Iterator[tuple[Any, RunState]]:
        """Run once and hold the arena: yields the address table, for repeating launches, and the
        state of PyTorch's calls."""
        self.runtime.weights.refresh()
        inputs, outputs = self._readable(self.in_memory(tensors)), self._new_outputs(binding)
        with self.pool.lease(binding.footprint_nbytes) as arena:
            execution = self._prepare(arena, binding)
            state = self._state(binding, arena, inputs, outputs)
            self._run_in(execution, binding, state, inputs, outputs)
            yield execution.table, state

    def _is_first(self, dims: tuple[int, ...]) -> bool:
        """Return whether a shape is new; remembers four times as many shapes as graphs."""
        with self.graphs.lock:
            first = dims not in self.graphs.used
            self.graphs.used[dims] = None
            return first

    def _readable(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors, with those whose address is no multiple of 16 copied."""
        dense = super()._readable(tensors)
        return [t if t.data_ptr() % 16 == 0 else t.clone() for t in dense]

    # --- graphs ---

    def _replay(self, binding: Binding, tensors: Sequence[torch.Tensor]) -> list[Any]:
        assert isinstance(binding, GraphBinding)
        with self.pool.lease(binding.graph_nbytes, poisoned=False) as arena:
            captured = self._find(arena, binding)
            outputs = self._play(captured, binding, tensors)
            # Checking every parameter takes as long as a short model runs: do it while the device
            # works, on memory that `captured` keeps alive; discard the results if a parameter has
            # changed.
            if self.runtime.weights.refresh():
                captured = self._find(arena, binding)
                outputs = self._play(captured, binding, tensors)
        failed = self.runtime.failed()
        if failed:
            self._explain_failure(failed)
        if self._plain_leaves is not None:
            return [outputs[k] for k in self._plain_leaves]
        state = self._state(binding, arena, tensors, outputs, tensors)
        return [leaf(state) for leaf in self._leaves]

    def _play(
        self, captured: CapturedGraph, binding: Binding, tensors: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Copy inputs in, replay, copy outputs out; one copy kernel per dtype."""
        call = self.runtime.device.call
        self._write_cells(captured.arguments, binding, tensors)
        into, given = self._copied_in(captured.inputs, tensors)
        if self._steps.cells is not None:
            into, given = self._steps.pair(into, given)
        if given:  # _foreach_copy_ rejects empty lists
            call(partial(torch._foreach_copy_, into, given))
        captured.graph.replay()
        # The device is busy: the remaining host work is hidden.
        self.runtime.placed.use(captured.kept)
        outputs = self._new_outputs(binding)
        if outputs:
            made = captured.outputs
            if self._steps.cells is not None:
                made = [fit(x, like) for x, like in zip(made, outputs, strict=True)]
            call(partial(torch._foreach_copy_, outputs, made))
        return outputs

    def _write_cells(
        self, arguments: Any, binding: Binding, tensors: Sequence[torch.Tensor]
    ) -> None:  # fmt: skip
        """Queue the copy of this call's values to the device cells."""
        if self._steps.cells is not None:
            assert isinstance(binding, GraphBinding) and self._steps.cache is not None
            cache = tensors[self._steps.cache].data_ptr()
            numbers = np.array((*binding.cells, cache), dtype=np.int64)
            self.runtime.device.call(partial(arguments.write_cells, numbers))

    def _run_in(
        self, execution: Execution, binding: Binding, state: RunState,
        inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor],
        ticks: Any = None, watch: Watch | None = None,
    ) -> None:  # fmt: skip
        self._write_cells(self.runtime.arguments(execution.table), binding, inputs)
        super()._run_in(execution, binding, state, inputs, outputs, ticks, watch)

    def _copied_in(
        self, inputs: list[torch.Tensor], tensors: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the destinations and sources of the copies into a graph's inputs."""
        return inputs, list(self.in_memory(tensors))

    def _derive(self, inputs: list[torch.Tensor]) -> None:
        """Queue work on the inputs at the start of a graph: none here."""

    def _find(self, arena: Any, binding: GraphBinding) -> CapturedGraph:
        """Return the shape's valid graph in this arena, captured now if there is none."""
        key = (arena.index, binding.key)
        stamp = (arena.data_ptr, arena.shrinks, self.runtime.weights.version, math_settings())
        with self.graphs.lock:
            captured = self.graphs.kept.find(key)
            if captured is not None and captured.stamp == stamp:
                return captured
        captured = self._capture(arena, binding, stamp)
        with self.graphs.lock:
            self.graphs.kept[key] = captured
        return captured

    def _capture(self, arena: Any, binding: GraphBinding, stamp: object) -> CapturedGraph:
        views = []
        for (shape, dtype), offset in zip(binding.outer, binding.outer_offsets, strict=True):
            part = arena.tensor[offset : offset + math.prod(shape) * dtype.itemsize]
            views.append(part.view(dtype).view(shape))
        count = len(self._inputs)
        inputs, outputs = views[:count], views[count:]  # a cache is addressed through cells only
        execution = self._prepare(arena, binding)
        self.runtime.bind(binding.sizes)
        state = self._state(binding, arena, inputs, outputs)
        recorder = self.graphs.recorders.get(arena.index)
        if recorder is None:
            recorder = self.graphs.recorders[arena.index] = self.runtime.device.recorder()

        run = super()._run_in  # cells are written before each replay, outside the graph

        def body() -> None:
            self._derive(inputs)
            run(execution, binding, state, inputs, outputs)

        try:
            graph = recorder.capture(body)
        except TurbotxError:
            raise
        except RuntimeError as error:  # usually an op that synchronizes
            raise _NotCapturable(first_line(error)) from error
        self.graph_captures += 1
        arguments = self.runtime.arguments(execution.table)
        return CapturedGraph(graph, inputs, outputs, stamp, execution.kept, arguments)

    def _point(self, execution: Execution, arena: Any, binding: Binding) -> None:
        super()._point(execution, arena, binding)
        with self.runtime.device.active():
            self.runtime.placed.use(execution.kept)
            self.runtime.arguments(execution.table)

    # --- inside a graph that the caller captures ---

    def _run_inside_capture(self, binding: Binding, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """Queue the launches into the caller's graph, in memory owned by that graph."""
        if self._steps.cells is not None:
            raise DeviceError(
                "a CUDA graph is being captured around a call with a key/value cache: it would "
                "repeat one step, at one length. Leave the capture out, since turbotx captures "
                "steps by itself, or call the model with use_cache=False"
            )
        if not self.runtime.placed.are_filled() or not self.runtime.is_loaded(binding.sizes):
            raise DeviceError(
                "a CUDA graph is being captured around a turbotx module whose program for these "
                "sizes has not run yet, or wants kernels that are not loaded, or whose parameters "
                "have changed: call it once before the capture, with inputs of these sizes"
            )
        device = self.runtime.torch_device
        memory = torch.empty(binding.footprint_nbytes, dtype=torch.uint8, device=device)
        arena = SimpleNamespace(tensor=memory, data_ptr=memory.data_ptr())  # an arena's interface
        execution = Execution(len(self.executable.slots))
        self._point(execution, arena, binding)
        self.callers_reads[execution.kept.version] = execution.kept
        inputs, outputs = self._readable(self.in_memory(tensors)), self._new_outputs(binding)
        state = self._state(binding, arena, inputs, outputs, tensors)
        self._run_in(execution, binding, state, inputs, outputs)
        return [leaf(state) for leaf in self._leaves]


class _NotCapturable(Exception):
    """A launch does something that cannot be captured."""
