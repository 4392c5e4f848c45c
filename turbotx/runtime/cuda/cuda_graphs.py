"""Graphs: a call on a GPU, plain at a shape's first use, a replayed CUDA graph from the second on.

In: an executable and how many graphs may be kept. Out: the same results. A graph reads and writes
the arena alone: inputs are copied in, outputs are copied out to tensors of the caller's::

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
from typing import Any

import numpy as np
import torch

from turbotx.capture.ambient import without_autocast
from turbotx.errors import BuildWarning, DeviceError, InputError, TurbotxError
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

# cuBLAS and 128-bit accesses are at their best from addresses like an allocator's.
ALIGNMENT = 256


@dataclass(frozen=True)
class GraphBinding(Binding):
    """A call at one shape, and where its graph has inputs and outputs: behind the intermediates.

    outer: shapes and dtypes of inputs, then of outputs. outer_offsets: where they lie.
    graph_nbytes: of all memory. key: the dims that one graph serves: those of the call, or of a
    decoder's steps as they are when the cache is full. cells: what kernels read on the device in
    this call.
    """

    outer: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    outer_offsets: tuple[int, ...]
    graph_nbytes: int
    key: tuple[int, ...]
    cells: tuple[int, ...] = ()


@dataclass(frozen=True)
class CapturedGraph:
    """A captured graph of one shape in one arena, and the values that it depends on.

    stamp: addresses, weights and settings at its capture. kept: the weights that it reads. frame:
    the arguments of its kernels, with the cells that they read.
    """

    graph: Graph
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    stamp: object
    kept: WeightsVersion
    frame: Any


class GraphCache:
    """LRU cache of a call's graphs, by arena and shape.

    used: shapes seen lately. recorders: one an arena, so that its graphs share temporary memory.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.used: LruDict[tuple[int, ...], None] = LruDict(4 * most)
        self.kept: LruDict[tuple[int, tuple[int, ...]], CapturedGraph] = LruDict(most)
        self.recorders: dict[int, GraphRecorder] = {}
        self.lock = threading.Lock()


class CudaGraphProgram(Program):
    """Runs launches one by one, or as one graph a shape; thread-safe as `Program` is."""

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
        """Return which output each leaf is, where each is one and nothing else."""
        place = {t.name: k for k, (t, _, _) in enumerate(self._outputs)}
        leaves = self.executable.leaves
        if all(isinstance(x, WholeTensor) and x.name in place for x in leaves):
            return [place[x.name] for x in leaves]
        return None

    def _plan_shape(self, dims: tuple[int, ...]) -> Binding:
        plain = super()._plan_shape(dims)
        inputs = [(shape(*dims), dtype) for shape, dtype in self._shapes]
        if self._steps.cache is not None:  # which is not copied
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
        """Return the call at one shape, as `Program.bind`; steps of a decoder are planned once for
        as many as its cache has room for."""
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
        """Run on `tensors`; see `Program.run`. The device may still be at work on return."""
        if torch.is_inference_mode_enabled():  # views are kept, which calls outside of it write to
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
        """Map the memory of a shape now, that of its graph included."""
        assert isinstance(binding, GraphBinding)
        self.pool.reserve(binding.graph_nbytes if self.graphs.most else binding.footprint_nbytes)

    @contextmanager
    def used(
        self, binding: Binding, tensors: Sequence[torch.Tensor]
    ) -> Iterator[tuple[Any, RunState]]:
        """Run once and keep the memory: yields the address table, for launches over it again, and
        what PyTorch's part of them works on."""
        self.runtime.weights.refresh()
        inputs, outputs = self._readable(self.in_memory(tensors)), self._new_outputs(binding)
        with self.pool.lease(binding.footprint_nbytes) as arena:
            execution = self._prepare(arena, binding)
            state = self._state(binding, arena, inputs, outputs)
            self._run_in(execution, binding, state, inputs, outputs)
            yield execution.table, state

    def _is_first(self, dims: tuple[int, ...]) -> bool:
        """Return whether a shape was not seen lately; remembers four times as many as graphs."""
        with self.graphs.lock:
            first = dims not in self.graphs.used
            self.graphs.used[dims] = None
            return first

    def _readable(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return tensors that kernels may read 16 bytes at a time: a slice that begins between
        is copied."""
        dense = super()._readable(tensors)
        return [t if t.data_ptr() % 16 == 0 else t.clone() for t in dense]

    # --- graphs ---

    def _replay(self, binding: Binding, tensors: Sequence[torch.Tensor]) -> list[Any]:
        assert isinstance(binding, GraphBinding)
        with self.pool.lease(binding.graph_nbytes, poisoned=False) as arena:
            captured = self._find(arena, binding)
            outputs = self._play(captured, binding, tensors)
            # Looking at every parameter takes as long as a short model: the device works meanwhile,
            # on memory that `captured` keeps, and its results are dropped if one has changed.
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
        """Copy inputs in, replay, copy outputs out: one kernel copies all of a dtype."""
        call = self.runtime.device.call
        self._write_cells(captured.frame, binding, tensors)
        into, given = self._copied_in(captured.inputs, tensors)
        if self._steps.cells is not None:
            into, given = self._steps.pair(into, given)
        if given:  # a list of none is refused
            call(partial(torch._foreach_copy_, into, given))
        captured.graph.replay()
        # The device is at work: the rest of the host's part costs nothing while that lasts.
        self.runtime.placed.use(captured.kept)
        outputs = self._new_outputs(binding)
        if outputs:
            made = captured.outputs
            if self._steps.cells is not None:
                made = [fit(x, like) for x, like in zip(made, outputs, strict=True)]
            call(partial(torch._foreach_copy_, outputs, made))
        return outputs

    def _write_cells(
        self, frame: Any, binding: Binding, tensors: Sequence[torch.Tensor]
    ) -> None:  # fmt: skip
        """Queue what kernels read on the device in this call."""
        if self._steps.cells is not None:
            assert isinstance(binding, GraphBinding) and self._steps.cache is not None
            cache = tensors[self._steps.cache].data_ptr()
            numbers = np.array((*binding.cells, cache), dtype=np.int64)
            self.runtime.device.call(partial(frame.write_cells, numbers))

    def _run_in(
        self, execution: Execution, binding: Binding, state: RunState,
        inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor],
        ticks: Any = None, watch: Watch | None = None,
    ) -> None:  # fmt: skip
        self._write_cells(self.runtime.frame(execution.table), binding, inputs)
        super()._run_in(execution, binding, state, inputs, outputs, ticks, watch)

    def _copied_in(
        self, inputs: list[torch.Tensor], tensors: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return what a call copies into a graph's inputs, and from where."""
        return inputs, list(self.in_memory(tensors))

    def _derive(self, inputs: list[torch.Tensor]) -> None:
        """Queue what a graph makes of its inputs before its launches: nothing, here."""

    def _find(self, arena: Any, binding: GraphBinding) -> CapturedGraph:
        """Return the graph of a shape in this arena, captured now if there is none that holds."""
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
        inputs, outputs = views[:count], views[count:]  # a cache is read through cells alone
        execution = self._prepare(arena, binding)
        self.runtime.bind(binding.sizes)
        state = self._state(binding, arena, inputs, outputs)
        recorder = self.graphs.recorders.get(arena.index)
        if recorder is None:
            recorder = self.graphs.recorders[arena.index] = self.runtime.device.recorder()

        run = super()._run_in  # cells are written before each replay, and not by it

        def body() -> None:
            self._derive(inputs)
            run(execution, binding, state, inputs, outputs)

        try:
            graph = recorder.capture(body)
        except TurbotxError:
            raise
        except RuntimeError as error:  # an op that waits for the device, most likely
            raise _NotCapturable(str(error).splitlines()[0]) from error
        self.graph_captures += 1
        frame = self.runtime.frame(execution.table)
        return CapturedGraph(graph, inputs, outputs, stamp, execution.kept, frame)

    def _point(self, execution: Execution, arena: Any, binding: Binding) -> None:
        super()._point(execution, arena, binding)
        with self.runtime.device.active():
            self.runtime.placed.use(execution.kept)
            self.runtime.frame(execution.table)

    # --- inside a graph that the caller captures ---

    def _run_inside_capture(self, binding: Binding, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """Queue into the caller's graph, in memory that this graph owns alone."""
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
        arena = _OwnMemory(torch.empty(binding.footprint_nbytes, dtype=torch.uint8, device=device))
        execution = Execution(len(self.executable.slots))
        self._point(execution, arena, binding)
        self.callers_reads[execution.kept.version] = execution.kept
        inputs, outputs = self._readable(self.in_memory(tensors)), self._new_outputs(binding)
        state = self._state(binding, arena, inputs, outputs, tensors)
        self._run_in(execution, binding, state, inputs, outputs)
        return [leaf(state) for leaf in self._leaves]


class _NotCapturable(Exception):
    """A launch does something that a graph cannot hold."""


class _OwnMemory:
    """What a run needs of an arena, over one plain tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.data_ptr = tensor.data_ptr()
