"""Engine: captures and runs the calls of one model; it stands behind everything `optimize` makes.

In: a model and options. Out: the model's outputs, from one compiled variant per kind of call
(which arguments, dtypes, ranks, flags) that serves any sizes::

    engine = Engine(model, Options())
    engine((), {"input_ids": ids, "attention_mask": mask})
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from turbotx.capture import Captured, capture
from turbotx.collection import pause_collection
from turbotx.errors import CaptureError, InputError, TrainingError
from turbotx.memory.pool import ChunkPool
from turbotx.observers import observers
from turbotx.options import Options
from turbotx.pipeline import Compiled, bind_weights, compile_captured, compile_rewritten
from turbotx.placement import find_device, open_device
from turbotx.program import Program
from turbotx.progress import show_progress
from turbotx.runtime.absent_device import AbsentDevice
from turbotx.runtime.device import Device
from turbotx.runtime.native import start_runtime
from turbotx.runtime.planned import Binding
from turbotx.signature import SizeMatcher
from turbotx.tracing import tracing

log = logging.getLogger("turbotx")

LONGER = 7
"""What a size is traced as where 2 turned out to be too short to be free: it has room for a model
that looks a few places back, and is no usual number of anything."""

_called_plainly = threading.local()
"""`engine`: whose model this thread is calling as it was, for a trace or a comparison."""


class Variant:
    """One capture: its compiled program and the matcher that tells which sizes it serves."""

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled
        self.program = compiled.program
        self.matcher = SizeMatcher(compiled.captured)
        self.out_spec = compiled.captured.out_spec
        self.effects = compiled.captured.effects


class Engine:
    """Captures and runs the calls of one model; it stands behind every kind of target."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model, self.options = model, options
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Forget every capture, as after `.to(...)`; the next call captures again."""
        with self._lock:
            self._variants: dict[Any, list[Variant]] = {}
            self._bound: dict[Any, tuple[Variant, Program, Binding]] = {}
            self._pools: dict[torch.device, ChunkPool] = {}

    # --- calling ---

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        variant, program, binding, tensors = self.check(args, kwargs)
        with torch.no_grad():
            outputs = program.run(binding, tensors)
        if variant.effects:
            count = variant.out_spec.num_leaves
            outputs, left = outputs[:count], outputs[count:]
            for effect in variant.effects:
                effect.replay(left)
        return pytree.tree_unflatten(outputs, variant.out_spec)

    def check(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Variant, Program, Binding, list[torch.Tensor]]:
        """Return what serves a call, and its tensors: the guards of every call, and all of them
        but the parameters' (`Weights.refresh`). Captures and binds where nothing serves it yet."""
        self.refuse_training()
        described, tensors = describe_call(args, kwargs)
        found = self._bound.get(described) if described is not None else None
        if found is None:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            key = _signature(leaves, spec)
            if described is None:
                described = (key, tuple(t.shape for t in tensors))
                found = self._bound.get(described)
        if found is None:
            for tensor in tensors:
                _refuse_tensor(tensor)
            found = self._bind(key, described, tensors, args, kwargs)
        elif torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            _refuse_gradient()
        return *found, tensors

    def refuse_training(self) -> None:
        """Raise TrainingError where the model is in training mode."""
        if self.model.training:
            raise TrainingError(
                f"{type(self.model).__name__} is in training mode, and turbotx is for inference "
                "only: call model.eval() first"
            )

    def _bind(
        self, key: Any, shapes: Any, tensors: list[torch.Tensor],
        args: tuple[Any, ...], kwargs: Mapping[str, Any],
    ) -> tuple[Variant, Program, Binding]:  # fmt: skip
        with self._lock:
            variant, dims = self._find(key, tensors, args, kwargs)
            program = variant.compiled.at(dims).program
            binding = program.bind(dims)
            if len(self._bound) >= self.options.max_shapes:
                self._bound.pop(next(iter(self._bound)))
            self._bound[shapes] = (variant, program, binding)
            return self._bound[shapes]

    def _find(
        self,
        key: Any,
        tensors: list[torch.Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> tuple[Variant, tuple[int, ...]]:
        """Return the variant that serves these sizes, captured now if there is none yet."""
        known = self._variants.setdefault(key, [])
        for variant in known:
            dims = variant.matcher.match([t.shape for t in tensors])
            if dims is not None:
                return variant, dims
        variant = Variant(self.make(args, kwargs))
        dims = variant.matcher.match([t.shape for t in tensors])
        if dims is None:
            why = variant.matcher.explain([t.shape for t in tensors])
            raise CaptureError(
                f"{type(self.model).__name__} was captured, but the capture does not hold for the "
                f"very call it came from: {why}"
            )
        known.append(variant)
        return variant, dims

    def make(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Compiled:
        """Capture and compile one call; the `observers` look at the result."""
        name = type(self.model).__name__
        with show_progress(f"capture {name}") as step:
            captured = self.capture(args, kwargs)
            step(f"compile {name}")
            finishes = [begin(self, captured, args, kwargs) for begin in observers]
            compiled = self.compile(captured)
            for finish in finishes:
                finish(compiled)
            return compiled

    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Captured:
        """Return one call as a graph that no pass has touched; the engine keeps nothing of it."""
        # What cannot run is said before the seconds that tracing takes.
        _, device = self._open_device(pytree.tree_leaves((args, kwargs)))
        if device is None and self.options.backend != "aten":
            start_runtime()
        with self._plain(), pause_collection():
            captured = capture(self.model, args, kwargs)
            captured = self._capture_elsewhere(captured, args, kwargs)
        log.info("captured %s over %s", captured.name, ", ".join(captured.dims))
        return captured

    def _capture_elsewhere(
        self, captured: Captured, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Captured:
        """Return a capture that serves more where this one took sizes of 1 and 2 for fixed, because
        what the model makes of them (the length less one) was 1; and where it does not serve the
        call itself (whose length is too short for its other branch), one of exactly its sizes."""
        leaves = pytree.tree_leaves((args, kwargs))
        shapes = [leaf.shape for leaf in leaves if isinstance(leaf, torch.Tensor)]
        traced = zip(captured.input_sizes, shapes, strict=True)
        fixed = any(n == 2 and m <= 2 for sizes, s in traced for n, m in zip(sizes, s, strict=True))
        served = SizeMatcher(captured).match(shapes) is not None
        for least in (*([LONGER] if fixed else []), *([] if served else [0])):
            try:
                found = capture(self.model, args, kwargs, least)
            except CaptureError:
                continue
            if SizeMatcher(found).match(shapes) is not None:
                return found
        return captured

    def compile(self, captured: Captured) -> Compiled:
        """Return the program of a captured call, over this engine's memory; rewrites its graph.

        It runs where the call's tensors and the model's parameters lie.
        """
        pool, device = self._find_memory(captured)
        # PyTorch gives sizes to a trace, whichever thread computes with them.
        with tracing(), pause_collection():
            return compile_captured(captured, self.model, self.options, pool, device)

    def compile_for(self, compiled: Compiled, target: str) -> Compiled:
        """Return the program of a call for "cpu" or a GPU that need not be here, as "sm_90"; it is
        to be saved, and builds nothing for a GPU yet."""
        chosen = "aten" if self.options.backend == "aten" else "auto"
        options = replace(self.options, backend=chosen)
        device = None if target == "cpu" else AbsentDevice(target)
        pool = ChunkPool(torch.device("cpu"))
        captured, text = compiled.captured, compiled.captured_text
        with tracing(), pause_collection():
            return compile_rewritten(captured, text, self.model, options, pool, device)

    def share(self, compiled: Compiled) -> Compiled:
        """Return what another engine compiled, with this engine's parameters and memory.

        The models must be of the same structure; nothing is traced.
        """
        pool, device = self._find_memory(compiled.captured)
        return bind_weights(compiled, self.model, self.options, pool, device)

    def _find_memory(self, captured: Captured) -> tuple[ChunkPool, Device | None]:
        nodes = captured.graph_module.graph.find_nodes(op="placeholder")
        place, device = self._open_device([node.meta["val"] for node in nodes])
        with self._lock:
            if place not in self._pools:
                self._pools[place] = ChunkPool(place, max_arenas=self.options.max_arenas)
        return self._pools[place], device

    def _open_device(self, leaves: list[Any]) -> tuple[torch.device, Device | None]:
        """Return where a call runs; the second is None on a CPU."""
        place = find_device(self.model, leaves)
        return place, open_device(place, self.options.backend)

    def run_plainly(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what the model itself makes of a call, without turbotx and gradients."""
        with self._plain(), torch.no_grad():
            return self.model(*args, **kwargs)

    @property
    def called_plainly(self) -> bool:
        """Whether this thread is calling the model as it was, for a trace or a comparison."""
        return getattr(_called_plainly, "engine", None) is self

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """Meanwhile, in this thread, an instance of an optimized class is called as it was."""
        before = getattr(_called_plainly, "engine", None)
        _called_plainly.engine = self
        try:
            yield
        finally:
            _called_plainly.engine = before

    # --- looking inside ---

    def keyed_variants(self) -> list[tuple[Any, Variant]]:
        """Return every capture with the signature of the calls that it serves."""
        with self._lock:
            return [(key, v) for key, variants in self._variants.items() for v in variants]

    def variants(self) -> list[Compiled]:
        with self._lock:
            return [v.compiled for variants in self._variants.values() for v in variants]

    def stats(self) -> dict[str, int]:
        """Return counts since the last reset: captures, kernel builds, plans, chunk allocations."""
        compiled = self.variants()
        programs = [x.program for c in compiled for x in c.twins]
        pools = [pool.stats() for pool in self._pools.values()]
        return {
            "captures": len(compiled),
            "kernel_builds": sum(p.runtime.builds for p in programs),
            "plans": sum(p.plans for p in programs),
            "graph_captures": sum(p.graph_captures for p in programs),
            "chunk_allocations": sum(pool.chunk_allocations for pool in pools),
            "mapped_nbytes": sum(pool.mapped_nbytes for pool in pools),
            "used_nbytes": sum(pool.used_nbytes for pool in pools),
            "peak_nbytes": sum(pool.peak_nbytes for pool in pools),
            "arenas": sum(pool.arenas for pool in pools),
        }

    def reserve(self, **dims: int) -> None:
        """Map the memory of the largest shape now, e.g. reserve(batch=8, seq=512)."""
        for compiled in self.variants():
            program = compiled.program
            unknown = set(dims) - set(program.dims)
            if unknown:
                known = ", ".join(program.dims)
                raise InputError(
                    f"reserve has no dim {sorted(unknown)}; this capture's are {known}"
                )
            values = tuple(dims.get(n, dims.get("batch", 1)) for n in program.dims)
            program = compiled.at(values).program
            program.reserve(program.bind(values))


_PLAIN = (bool, int, float, str, type(None))


def describe_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[torch.Tensor]]:
    """Return all that a call is told from others by, in one pass, and its tensors in order.

    None instead of a description where an argument is neither a tensor nor a plain constant.
    """
    parts: list[Any] = [len(args), *kwargs]
    tensors = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            parts += (value.shape, value.dtype, value.device)
            tensors.append(value)
        elif type(value) in _PLAIN:
            parts += (type(value), value)
        else:
            return None, []
    return tuple(parts), tensors


def _signature(leaves: list[Any], spec: pytree.TreeSpec) -> Any:
    """Return what decides which capture a call belongs to: everything but tensors' sizes."""
    described = tuple(
        (leaf.dtype, leaf.device, leaf.dim()) if isinstance(leaf, torch.Tensor) else _constant(leaf)
        for leaf in leaves
    )
    return (spec, described)


def _constant(leaf: Any) -> Any:
    if isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device, type(None))):
        return (type(leaf), leaf)
    try:
        hash(leaf)
    except TypeError:
        return (type(leaf), id(leaf))
    return leaf


def _refuse_tensor(tensor: torch.Tensor) -> None:
    if tensor.device.type not in ("cpu", "cuda"):
        raise InputError(
            f"an input is on {tensor.device}, and turbotx runs on CPUs and NVIDIA GPUs: move the "
            'model and its inputs with .to("cpu") or .to("cuda")'
        )
    if tensor.layout is not torch.strided:
        raise InputError(f"an input has layout {tensor.layout}; turbotx takes dense tensors only")
    if tensor.requires_grad and torch.is_grad_enabled():
        _refuse_gradient()


def _refuse_gradient() -> None:
    raise TrainingError(
        "an input requires grad, and turbotx is for inference only: call it under "
        "torch.no_grad(), or pass input.detach()"
    )
