"""Engine: the per-model cache of compiled variants behind `turbotx.optimize`.

In: a model and options. Out: the model's outputs, from one compiled variant per kind of call
(which arguments, dtypes, ranks, flags) that serves any sizes::

    engine = Engine(model, Options())
    engine((), {"input_ids": ids, "attention_mask": mask})
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.profiler import record_function

from turbotx.capture.ambient import (
    Ambient,
    read_ambient,
    read_asked,
    read_decisive,
    without_autocast,
)
from turbotx.capture.arguments import carry, flatten_call
from turbotx.capture.call_key import describe_call, make_signature
from turbotx.capture.capture_sizes import capture_sizes
from turbotx.capture.composition import leave_foreign, turbotx_disabled
from turbotx.capture.decisions import Outcomes, UndecidedError
from turbotx.capture.module_state.record import Difference, training_error
from turbotx.capture.quiet import quiet_torch
from turbotx.capture.refusals import (
    refuse_foreign_weights,
    refuse_gradient,
    refuse_modes,
    refuse_tensor,
)
from turbotx.capture.trace import Captured
from turbotx.capture.tracing import tracing
from turbotx.engine.compiled import AssembledCall, Compiled
from turbotx.engine.eager_calls import EagerCalls
from turbotx.engine.failures import named_failures, too_many_captures, without_frames
from turbotx.engine.launch_ranges import LaunchRanges
from turbotx.engine.observers import compile_observed
from turbotx.engine.pipeline import bind, build_ahead, compile_captured, schedule
from turbotx.engine.progress import show_progress
from turbotx.engine.state_guard import StateGuard
from turbotx.engine.variant import Recaptures, Variant
from turbotx.errors import CaptureError, InputError, ModelChangedError, TrainingError
from turbotx.ir.memory_order import expanded_dims
from turbotx.memory.pool import ChunkPool
from turbotx.options import Options
from turbotx.runtime.binding import Binding
from turbotx.runtime.cpu.launch_table import start_libraries
from turbotx.runtime.cuda.absent_device import absent_device
from turbotx.runtime.device import Device
from turbotx.runtime.gc_pause import pause_gc
from turbotx.runtime.lru import LruDict
from turbotx.runtime.packed_parameter import restored
from turbotx.runtime.placement import find_device, open_device, target_of
from turbotx.runtime.program import Program, Run, run_bound

log, guards = map(logging.getLogger, ("turbotx.capture", "turbotx.guards"))

MOST_CHANGES = 8
"""How often one call is captured again because its parameters were converted meanwhile."""


class Engine(EagerCalls):
    """Captures, compiles and runs the calls of one model; thread-safe."""

    guards_state = True  # whether captures are guarded by attributes, hooks and globals
    settles = True  # see `capture_sizes`

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model)
        self.options = options
        self.tolerates: Callable[[], bool] = lambda: False
        """Whether refused calls run in PyTorch instead; they are then not traced a second time."""
        self._lock = threading.RLock()
        self._calls = itertools.count(1)
        self.reset()

    def reset(self) -> None:
        """Drop every capture, as after `.to(...)`; the next call captures again."""
        with self._lock:
            self._variants: dict[Any, list[Variant]] = {}
            self._bound = LruDict[Any, tuple[Variant, Program, Binding]](self.options.max_shapes)
            self._pools: dict[torch.device, ChunkPool] = {}
            self._recaptures = Recaptures()
            self._refused: dict[Any, CaptureError] = {}
            self.parts: dict[str, Any] = {}
            self._asked: tuple[int, ...] = ()  # read by traces, as indices into `ambient.NAMES`

    # --- calling ---

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call; return the model's output. Captures and compiles if no variant serves it."""
        run = self.run_flat
        if torch.autograd._profiler_enabled():
            run = record_function(f"turbotx: {type(self.model).__name__}")(run)
        try:
            variant, outputs = run(args, kwargs)
        except UndecidedError as error:
            self.count_eager(str(error))
            return self.run_eager(args, kwargs)
        return variant.build(outputs, args, kwargs)

    def run_flat(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], run: Run = run_bound
    ) -> tuple[Variant, list[Any]]:
        """Return what served a call, and the flat outputs; raise UndecidedError if nothing can."""
        outcomes: Outcomes = ()
        for _ in range(MOST_CHANGES):
            variant, program, binding, tensors = self.check(args, kwargs, outcomes)
            watch = LaunchRanges(program) if self.options.launch_ranges else None
            try:
                with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
                    outputs, dims = run(program, binding, tensors, watch)
            except ModelChangedError as error:
                self._forget(variant, error)
                continue
            if variant.needs_post_run:
                if otherwise := variant.observe(outputs, dims):
                    outcomes, self.decided_otherwise = otherwise, self.decided_otherwise + 1
                    continue
                outputs = variant.apply_effects(outputs)
            if outcomes:
                self.warn_rerun(outcomes)
            return variant, outputs
        raise too_many_captures(type(self.model).__name__, MOST_CHANGES, outcomes)

    def _forget(self, variant: Variant, error: ModelChangedError) -> None:
        """Drop a variant whose parameters changed in kind since it was compiled."""
        log.info("%s: a call is captured anew, because %s", type(self.model).__name__, error)
        with self._lock:
            for variants in self._variants.values():
                variants[:] = [v for v in variants if v is not variant]
            self._unbind(variant)

    def _unbind(self, variant: Variant) -> None:
        for shapes in [k for k, b in self._bound.items() if b[0] is variant]:
            del self._bound[shapes]

    def refresh(self) -> None:
        """Recompute packed weights and hoisted constants at the next call."""
        for program in (p for compiled in self.variants() for p in compiled.programs):
            program.runtime.weights.forget()
        for part in list(self.parts.values()):  # the encoder, the steps with a cache
            part._turbotx_engine.refresh()

    def check(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], outcomes: Outcomes = ()
    ) -> tuple[Variant, Program, Binding, list[torch.Tensor]]:
        """Check a call's guards, except those on parameters (`Weights.refresh`); return what serves
        it, and its tensors. Captures and binds if nothing serves it yet. outcomes: of its first
        decisions, if an earlier run has found them."""
        self.refuse_training()
        ambient = read_decisive()
        ambient += read_asked(self._asked) if self._asked else ()
        described, tensors = describe_call(args, kwargs, ambient)
        found = self._bound.find(described) if described is not None else None
        if found is not None and not found[0].takes(tensors):
            described = (described, found[0].numbers(tensors))
            found = self._bound.find(described)
        if found is None or outcomes or not found[0].holds():
            found, tensors = self._find_or_bind(described, args, kwargs, ambient, outcomes)
        elif torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            refuse_gradient()
        found[0].used = next(self._calls)
        return *found, tensors

    def _find_or_bind(
        self, described: Any, args: tuple[Any, ...], kwargs: dict[str, Any], ambient: Ambient,
        outcomes: Outcomes,
    ) -> tuple[tuple[Variant, Program, Binding], list[torch.Tensor]]:  # fmt: skip
        """Look up a call that the fast path did not find; capture and bind it if necessary."""
        leave_foreign(pytree.tree_leaves((args, kwargs)) if described is None else ())
        leaves, spec = flatten_call(args, kwargs)
        leave_foreign(leaves)
        tensors = carry(leaves)
        for tensor in tensors:
            refuse_tensor(tensor)
        key = make_signature(leaves, spec, ambient)
        found = None
        if described is None:
            described = (key, ambient, tuple((t.shape, expanded_dims(t)) for t in tensors))
            found = self._bound.find(described)
            if found is not None and not found[0].takes(tensors):
                described = (described, found[0].numbers(tensors))
                found = self._bound.find(described)
        if found is None or outcomes or not found[0].holds():
            found = self._bind(key, described, tensors, args, kwargs, outcomes)
        return found, tensors

    def refuse_training(self) -> None:
        """Raise TrainingError if the model is in training mode."""
        if vars(self.model).get("_exported_training", self.model.training):  # of exported models
            raise TrainingError(
                f"{type(self.model).__name__} is in training mode, and turbotx is for inference "
                "only: call model.eval() first"
            )

    def _bind(
        self, key: Any, shapes: Any, tensors: list[torch.Tensor],
        args: tuple[Any, ...], kwargs: Mapping[str, Any], outcomes: Outcomes,
    ) -> tuple[Variant, Program, Binding]:  # fmt: skip
        with self._lock:
            variant, dims = self._find(key, tensors, args, kwargs, outcomes)
            with named_failures(type(self.model).__name__):
                program = variant.compiled.at(dims).program
                binding = program.bind(dims)
            found = self._bound[shapes] = (variant, program, binding)
            return found

    def _find(
        self, key: Any, tensors: list[torch.Tensor], args: tuple[Any, ...],
        kwargs: Mapping[str, Any], outcomes: Outcomes,
    ) -> tuple[Variant, tuple[int, ...]]:  # fmt: skip
        """Return a variant for these sizes, and its dim values; capture one if there is none."""
        known, ambient = self._variants.setdefault(key, []), read_ambient()
        changed: list[Difference] = []
        for variant in sorted(known, key=Variant.recency):
            dims = variant.matcher.match([t.shape for t in tensors])
            captured = variant.compiled.captured
            if dims is None or not captured.serves(ambient, tensors, outcomes):
                continue
            if variant.holds():
                return variant, dims
            if variant.guard is not None:
                changed += self._find_difference(variant.guard)
        refuse_modes(ambient)
        self._recaptures.refuse_endless(changed, type(self.model).__name__)
        if key in self._refused and self.tolerates():
            raise without_frames(self._refused[key])
        if outcomes:
            self._recaptures.refuse_outcomes(key, outcomes)
        try:
            variant = Variant(self.make(args, kwargs, outcomes), self.guards_state)
        except CaptureError as error:
            if outcomes:
                raise self._recaptures.give_up(key, outcomes, error) from error
            self._refused[key] = without_frames(error)
            raise
        self._refused.pop(key, None)
        self._recaptures.note(changed, variant)
        dims = variant.matcher.match([t.shape for t in tensors])
        if dims is None:
            why = variant.matcher.explain([t.shape for t in tensors])
            raise CaptureError(
                f"{type(self.model).__name__} was captured, but the capture does not fit the "
                f"call that it was made from: {why}"
            )
        known.append(variant)
        asked = {*self._asked, *variant.compiled.captured.asked}
        if len(asked) > len(self._asked):  # the key of every later call includes it
            self._asked = tuple(sorted(asked))
            self._bound.clear()
        variant.used = next(self._calls)
        self._drop_unused()
        return variant, dims

    def _find_difference(self, guard: StateGuard) -> list[Difference]:
        """Return why a variant's guard failed; raise TrainingError if training mode is why."""
        found = guard.difference()
        if found is None:
            return []
        if found.is_training:
            raise training_error(self.model, found.place.text)
        guards.info("%s changed since a capture: %s", type(self.model).__name__, found)
        return [found]

    def _drop_unused(self) -> None:
        """Drop the least recently used captures beyond `max_variants`."""
        kept = [(v.used, key, v) for key, variants in self._variants.items() for v in variants]
        kept.sort(key=lambda entry: entry[0])
        for _, key, variant in kept[: len(kept) - self.options.max_variants]:
            log.info(
                "dropped a capture of %s: more than max_variants=%d are in use",
                type(self.model).__name__, self.options.max_variants,
            )  # fmt: skip
            self._variants[key].remove(variant)
            self._unbind(variant)

    def make(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], outcomes: Outcomes = ()
    ) -> Compiled:
        """Capture and compile one call; `observers` see the result."""
        name = type(self.model).__name__
        with show_progress(f"capture {name}") as step:
            captured = self.capture(args, kwargs, outcomes)
            step(f"compile {name}")
            compiled: Compiled = compile_observed(self, captured, args, kwargs)
            return compiled

    def capture(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], outcomes: Outcomes = ()
    ) -> Captured:
        """Return the captured graph of one call, before any pass; the engine does not keep it."""
        with restored(self.model):
            refuse_foreign_weights(self.model)  # before the seconds that tracing takes
            _, device = self._open_device(flatten_call(args, kwargs)[0])
            if device is None and self.options.backend != "aten":
                own = "products" if self.options.quantize == "none" else "quantized"
                start_libraries(("runtime", own))
            with turbotx_disabled(), pause_gc(), named_failures(type(self.model).__name__):
                captured = capture_sizes(self.model, args, kwargs, outcomes, self.settles)
        log.info("captured %s over %s", captured.name, ", ".join(captured.dims))
        return captured

    def compile(self, captured: Captured, target: str | None = None) -> Compiled:
        """Compile a captured call and bind it to this engine's memory; rewrites its graph.

        target: None for the device of the call and its parameters. Otherwise "cpu" or a GPU such as
        "sm_90", which need not be present: the result is for inspection or saving, and builds no
        GPU kernels.
        """
        options, name = self.options, captured.name
        if target is None:
            pool, device = self._find_memory(captured)
        else:
            pool, device = ChunkPool(torch.device("cpu")), absent_device(target)
            options = replace(options, backend="aten" if options.backend == "aten" else "auto")
        # Sizes belong to the trace, whichever thread evaluates them.
        with tracing(), without_autocast(), pause_gc(), named_failures(name), quiet_torch():
            program = compile_captured(captured, options, *target_of(device))
            compiled = bind(program, self.model, pool, device)
            return compiled if target is not None else build_ahead(compiled)

    def bind(self, call: AssembledCall, options: Options | None = None) -> Compiled:
        """Return another engine's call, perhaps under other options, bound to this engine's
        parameters and memory; both models must have the same structure."""
        pool, device = self._find_memory(call.captured)
        with without_autocast():
            program = schedule(call, options or self.options, *target_of(device))
            return bind(program, self.model, pool, device)

    def _find_memory(self, captured: Captured) -> tuple[ChunkPool, Device | None]:
        nodes = captured.graph_module.graph.find_nodes(op="placeholder")
        place, device = self._open_device([node.meta["val"] for node in nodes])
        with self._lock:
            if place not in self._pools:
                self._pools[place] = ChunkPool(place, max_arenas=self.options.max_arenas)
        return self._pools[place], device

    def _open_device(self, leaves: list[Any]) -> tuple[torch.device, Device | None]:
        """Return the device of a call, and its driver, None on a CPU."""
        place = find_device(self.model, leaves)
        return place, open_device(place, self.options.backend)

    # --- inspection ---

    def keyed_variants(self) -> list[tuple[Any, Variant]]:
        """Return every variant with the signature of the calls that it serves."""
        with self._lock:
            return [(key, v) for key, variants in self._variants.items() for v in variants]

    def variants(self) -> list[Compiled]:
        """Return every compiled capture, in order of creation within a kind of call."""
        with self._lock:
            return [v.compiled for variants in self._variants.values() for v in variants]

    def stats(self) -> dict[str, int]:
        """Return counts since the last reset (captures, kernel builds, plans, chunk allocations),
        summed with those of separately optimized parts."""
        compiled = self.variants()
        programs = [program for c in compiled for program in c.programs]
        pools = [pool.stats() for pool in self._pools.values()]
        memory = ("chunk_allocations", "mapped_nbytes", "used_nbytes", "peak_nbytes", "arenas")
        found = {
            "captures": len(compiled),
            "eager_calls": self.eager_calls,
            "decided_otherwise": self.decided_otherwise,
            "kernel_builds": sum(p.runtime.builds for p in programs),
            "plans": sum(p.plans for p in programs),
            "graph_captures": sum(p.graph_captures for p in programs),
            **{name: sum(getattr(pool, name) for pool in pools) for name in memory},
        }
        parts = [part._turbotx_engine.stats() for part in self.parts.values()]
        return {name: sum(x[name] for x in (found, *parts)) for name in found}

    def reserve(self, **dims: int) -> None:
        """Map the memory of the largest shape now: reserve(batch=8, seq=512). Raises InputError."""
        for compiled in self.variants():
            program = compiled.program
            unknown = set(dims) - set(program.dims)
            if unknown:
                known = ", ".join(program.dims)
                raise InputError(f"reserve has no dim {sorted(unknown)}; this capture has {known}")
            values = tuple(dims.get(n, dims.get("batch", 1)) for n in program.dims)
            program = compiled.at(values).program
            program.reserve(program.bind(values))
