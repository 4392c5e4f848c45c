"""Step engine: captures and runs a decoder's calls with a key/value cache of any length.

In: a call of `capture.cached_call`, in which `StepCalls` has replaced the cache by plain tensors.
Out: the model's output. A new length needs no capture, no solving of sizes and no planning::

    StepEngine(gpt2, Options(), CacheBudget()).run({"input_ids": ids}, DynamicCache())
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from turbotx.capture.ambient import Ambient, read_asked, read_decisive
from turbotx.capture.cached_call import CACHE, CachedCall, find_appends
from turbotx.capture.call_key import describe_kind
from turbotx.capture.decisions import Outcomes
from turbotx.capture.refusals import refuse_gradient
from turbotx.capture.trace import Captured
from turbotx.engine.compiled import Compiled
from turbotx.engine.engine import Engine
from turbotx.engine.observers import compile_observed
from turbotx.engine.progress import show_progress
from turbotx.engine.step_call import StepCalls, count_batch
from turbotx.engine.step_example import make_example
from turbotx.engine.variant import Variant
from turbotx.errors import CaptureError, InputError, ModelChangedError
from turbotx.ir.expr import evaluate
from turbotx.memory.cache_blocks import CacheBudget
from turbotx.options import Options
from turbotx.runtime.binding import Binding
from turbotx.runtime.cache_memory import LEAST_CAPACITY, LayerShape, make_table
from turbotx.runtime.program import Program


class StepEngine(StepCalls, Engine):
    """Captures, compiles and runs calls with a cache; `shapes` is known after the first capture."""

    settles = False  # values of the example tensors decide nothing

    def __init__(self, model: nn.Module, options: Options, budget: CacheBudget) -> None:
        cls = type(type(model).__name__, (CachedCall,), {})  # messages name the user's class
        super().__init__(cls(model, _count_layers(model)), options)
        self.name, self.budget = type(model).__name__, budget
        self.shapes: tuple[LayerShape, ...] = ()
        weights = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        self._dtype, self.device = weights.dtype, weights.device

    def reset(self) -> None:
        """Drop every capture and the record of the latest steps."""
        super().reset()
        self._known: dict[Any, tuple[Variant, tuple[int, ...]]] = {}
        """By kind of call, ignoring sizes: the latest variant, and which of its dims grow at every
        step."""
        self._dtypes: dict[Ambient, torch.dtype] = {}
        """The dtype of keys and values, which autocast can change."""

    def _forget(self, variant: Variant, error: ModelChangedError) -> None:
        super()._forget(variant, error)
        self._known.clear()

    def _drop_unused(self) -> None:
        super()._drop_unused()
        self._known.clear()

    def check(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], outcomes: Outcomes = ()
    ) -> tuple[Variant, Program, Binding, list[torch.Tensor]]:
        """As `Engine.check`; a new cache length needs no solving of sizes and no planning."""
        ambient = read_decisive()
        if self._asked:
            ambient += read_asked(self._asked)
        kind, tensors = describe_kind(kwargs, ambient)
        known = self._known.get(kind) if kind is not None else None
        if known is not None and not outcomes and known[0].holds():
            variant, stepping = known
            captured = variant.compiled.captured
            dims = captured.matcher.match([t.shape for t in tensors])
            if dims is not None and captured.expanded.serve(tensors):
                if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
                    refuse_gradient()
                program = variant.compiled.at(dims).program
                variant.used = next(self._calls)
                return variant, program, program.bind_step(dims, stepping), tensors
        found = super().check(args, kwargs, outcomes)
        captured = found[0].compiled.captured
        if kind is not None and not captured.floats:
            self._known[kind] = found[0], self.find_stepping(found[0])
        return found

    def find_stepping(self, variant: Variant) -> tuple[int, ...]:
        """Return the indices of a capture's dims that grow at every step."""
        captured = variant.compiled.captured
        # If the mask must be as long as the cache, their common dim has the mask's name.
        size = captured.input_sizes[captured.input_names.index("kv_length")][0]
        length = evaluate(size, dict(zip(captured.dims, captured.example_dims, strict=True)))
        return tuple(k for k, n in enumerate(captured.example_dims) if n == length)

    @property
    def _turbotx_engine(self) -> StepEngine:
        return self  # `parts` of an engine are expected to have one

    def run(self, given: dict[str, Any], cache: Any) -> Any:
        """Run a call as `StepCalls`; retry if the dtype of the parameters has changed."""
        try:
            return super().run(given, cache)
        except _OtherDtypeError:
            self._forget_dtypes()
            return super().run(given, cache)

    def run_plain(self, call: Mapping[str, Any], cache: Any) -> Any:
        """Run the program of a call of plain tensors; capture it if there is none yet."""
        variant, outputs = self.run_flat((), dict(call))
        leaves = [cache if type(x) is str and x == CACHE else x for x in outputs]
        return variant.build_output(leaves)

    def find_dtype(self, call: Mapping[str, Any]) -> torch.dtype:
        """Return the dtype of the keys and values. The first call is captured over memory of
        arbitrary size; its graph tells the size and dtype needed. Raises CaptureError if the dtype
        depends on that of the cache."""
        known = self._dtypes.get(read_decisive())
        if known is not None and self.shapes:
            return known
        dtype, length = self._dtype, call["kv_length"].shape[0]
        room = -(-length // LEAST_CAPACITY) * LEAST_CAPACITY
        for _ in range(2):
            memory = torch.zeros(1, count_batch(call), room, dtype=dtype, device=self.device)
            table = torch.zeros(2 * cast(int, self.model.layers), memory.shape[1], 1)
            table = table.to(self.device, torch.int64)
            try:
                found = self.check((), {**call, "kv_memory": memory, "kv_table": table})
            except _OtherDtypeError as error:
                dtype = error.dtype
                self._forget_dtypes()
            else:
                self._dtypes[read_decisive()] = dtype
                self.least_columns = found[1].executable.least_columns
                return dtype
        raise CaptureError("the model's keys and values have a dtype that depends on the cache's")

    def _forget_dtypes(self) -> None:
        with self._lock:
            self._dtypes.clear()
            refused = self._refused.items()
            self._refused = {k: e for k, e in refused if not isinstance(e, _OtherDtypeError)}

    def make(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], outcomes: Outcomes = ()
    ) -> Compiled:
        """Capture and compile; observers get the example call, over memory of its own."""
        with show_progress(f"capture {self.name} with a cache") as step:
            captured = self.capture(args, kwargs, outcomes)
            step(f"compile {self.name} with a cache")
            example = make_example(kwargs)
            memory = example["kv_memory"]
            size = sum(s.heads * (s.key_width + s.value_width) for s in self.shapes)
            room = memory.shape[1], LEAST_CAPACITY
            drawn = torch.randn(size, *room, generator=torch.Generator().manual_seed(0))
            example["kv_memory"] = drawn.to(memory)
            example["kv_table"] = make_table(self.shapes, example["kv_memory"])
            compiled: Compiled = compile_observed(self, captured, (), example)
            return compiled

    def capture(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], outcomes: Outcomes = ()
    ) -> Captured:
        """Capture a call at the example sizes, and record the shapes it writes to the cache. Raises
        CaptureError if layers write no keys and values, several dtypes, or other shapes than
        before."""
        captured = super().capture(args, make_example(kwargs), outcomes)
        nodes = find_appends(captured.graph_module.graph)
        parts: dict[int, list[torch.Tensor]] = {}
        for node in nodes:
            _, _, new, _, _, layer, *_ = cast(tuple[Any, ...], node.args)
            parts.setdefault(int(layer), []).append(new.meta["val"])
        layers = range(cast(int, self.model.layers))
        if sorted(parts) != list(layers) or any(len(p) != 2 for p in parts.values()):
            raise CaptureError(
                f"cannot capture {captured.name} with a cache: of its {len(layers)} layers, "
                f"{sorted(parts)} write keys and values"
            )
        dtypes = {x.dtype for pair in parts.values() for x in pair}
        if len(dtypes) > 1:
            names = " and ".join(sorted(map(str, dtypes)))
            raise CaptureError(
                f"cannot capture {captured.name} with a cache: its layers write {names}, as under "
                "autocast, and a cache has one dtype: convert the model instead, or use_cache=False"
            )
        if dtypes != {kwargs["kv_memory"].dtype}:
            raise _OtherDtypeError(dtypes.pop())
        shapes = tuple(
            LayerShape(int(k.shape[1]), int(k.shape[3]), int(v.shape[3]))
            for k, v in (parts[i] for i in layers)
        )
        if self.shapes not in ((), shapes):
            raise CaptureError(
                f"cannot capture {captured.name} with a cache: its layers write {shapes}, and "
                f"those of another call {self.shapes}"
            )
        self.shapes = self.shapes or shapes  # caches compare by identity first
        return captured


class _OtherDtypeError(CaptureError):
    """Keys and values have another dtype than the memory that the call was traced with."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(f"the model writes keys and values of {dtype}")
        self.dtype = dtype


def _count_layers(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise InputError(
            f"{type(model).__name__} is called with a key/value cache, and has no config of "
            "transformers that says how many layers it has: leave the cache out"
        )
    return len(DynamicCache(config=config.get_text_config(decoder=True)).layers)
