"""Cached engine: a decoder's calls with a key/value cache, through one capture for every length.

In: a call with a DynamicCache, or an EncoderDecoderCache of two, as transformers' `generate` makes
it. Out: the model's output, with the same cache object in it, one step longer::

    engine((), {"input_ids": ids, "past_key_values": DynamicCache(), "use_cache": True})
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Hashable, Mapping
from typing import Any, cast

import torch
from torch import nn

from turbotx.capture.ambient import read_asked, read_decisive
from turbotx.capture.call_key import describe_kind
from turbotx.capture.decisions import Outcomes, UndecidedError
from turbotx.capture.refusals import refuse_gradient
from turbotx.capture.trace import Captured
from turbotx.engine.compiled import Compiled
from turbotx.engine.engine import Engine
from turbotx.engine.step_example import make_example
from turbotx.engine.variant import Variant
from turbotx.errors import CaptureError, InputError, ModelChangedError
from turbotx.options import Options
from turbotx.runtime.binding import Binding
from turbotx.runtime.cache_memory import CacheMemory, LayerShape
from turbotx.runtime.program import Program

ARGUMENT = "past_key_values"


def make_engine(model: nn.Module, options: Options) -> Engine:
    """Return the engine of a model: one that knows caches where its forward takes one."""
    try:
        names = inspect.signature(type(model).forward).parameters
    except (TypeError, ValueError):  # it is no function of Python's
        return Engine(model, options)
    return (CachedEngine if ARGUMENT in names else Engine)(model, options)


class CachedEngine(Engine):
    """An engine whose calls may have a cache of transformers."""

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call: with a cache of transformers' by steps over turbotx's own memory,
        otherwise as `Engine` does. Raises TrainingError in training mode."""
        cache = kwargs.get(ARGUMENT)
        if cache is None and len(args) > 1 and any(map(_is_cache, args)):
            kwargs = self._name_all(args, kwargs)
            args, cache = (), kwargs.get(ARGUMENT)
        if cache is None or not _is_cache(cache):
            return super().__call__(args, kwargs)
        self.refuse_training()
        given = self._name_all(args, kwargs)
        del given[ARGUMENT]
        try:
            return self._steps().run(given, cache)
        except UndecidedError as error:
            self.count_eager(str(error))
            return self.run_plainly(args, kwargs)

    def _steps(self) -> StepEngine:
        steps = self.parts.get("steps")
        if steps is None:
            with self._lock:
                steps = self.parts.setdefault("steps", StepEngine(self.model, self.options))
            steps.tolerates = lambda: self.tolerates()
        return steps

    def _name_all(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return every argument by name."""
        if not args:
            return dict(kwargs)
        names = _names_of(cast(Hashable, type(self.model)))
        if len(args) > len(names):
            raise InputError("a call with a key/value cache names its arguments")
        return {**dict(zip(names, args, strict=False)), **kwargs}


class StepEngine(Engine):
    """Runs calls whose cache is plain tensors (`capture.cached_call`) over the memory of a cache.

    shapes, dtype: of what the model's layers write to the cache; they are known once a call was
    captured.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        from turbotx.capture.cached_call import CachedCall

        cls = type(type(model).__name__, (CachedCall,), {})  # messages name the user's class
        super().__init__(cls(model, _count_layers(model)), options)
        self.shapes: tuple[LayerShape, ...] = ()
        weights = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        self.dtype, self.device = weights.dtype, weights.device

    def reset(self) -> None:
        """Forget every capture, and what served the latest steps."""
        super().reset()
        self._known: dict[Any, tuple[Variant, tuple[int, ...]]] = {}
        """By kind of call, whatever its sizes: what served the latest, and which of its dims grow
        with every step."""

    def _forget(self, variant: Variant, error: ModelChangedError) -> None:
        super()._forget(variant, error)
        self._known.clear()

    def _drop_unused(self) -> None:
        super()._drop_unused()
        self._known.clear()

    def check(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], outcomes: Outcomes = ()
    ) -> tuple[Variant, Program, Binding, list[torch.Tensor]]:
        """Return what serves a call, and its tensors, as `Engine.check`; a new length of the cache
        is neither solved nor planned for."""
        ambient = read_decisive()
        if self._asked:
            ambient += read_asked(self._asked)
        kind, tensors = describe_kind(kwargs, ambient)
        known = self._known.get(kind) if kind is not None else None
        if known is not None and not outcomes and known[0].holds():
            variant, stepping = known
            dims = variant.compiled.captured.matcher.match([t.shape for t in tensors])
            if dims is not None:
                if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
                    refuse_gradient()
                program = variant.compiled.at(dims).program
                variant.used = next(self._calls)
                return variant, program, program.bind_step(dims, stepping), tensors
        found = super().check(args, kwargs, outcomes)
        captured = found[0].compiled.captured
        if kind is not None and not captured.floats:
            length = make_example(kwargs)["kv_length"].shape[0]
            steps = tuple(k for k, n in enumerate(captured.example_dims) if n == length)
            self._known[kind] = found[0], steps
        return found

    @property
    def _turbotx_engine(self) -> StepEngine:
        return self  # as a part of another engine

    def run(self, given: dict[str, Any], cache: Any) -> Any:
        """Return the model's output for a call, and leave its keys and values in the cache.

        given: the arguments by name, less the cache. Raises InputError for a cache of another kind.
        """
        from turbotx.capture.cached_call import count_queries
        from turbotx.engine.cache_layers import adopt, refuse_cache

        if self.device.type != "cpu":
            raise InputError(
                f"a call with a key/value cache runs on CPUs, and the model is on {self.device}: "
                "call it with use_cache=False"
            )
        refuse_cache(cache)
        kind = _kind_of(cache)
        own = cache if kind == "decoder" else cache.self_attention_cache
        call = _with_encoded(given)
        count, batch = count_queries(call, kind), _count_batch(call, kind)
        call |= {"kv_kind": kind}
        if kind == "further":
            call |= {"kv_cross": _cross_memory(cache, batch, self.dtype)}
        past = own.get_seq_length()
        length = torch.empty(past + count, 0, device=self.device)
        if not self.shapes:
            self._learn_shapes(call, batch, length)
        memory = adopt(own, self.shapes, self.dtype, self.device)
        with memory.owned():
            if memory.length != past:
                raise InputError("another thread has changed the key/value cache meanwhile")
            call |= {"kv_memory": memory.tensor_for(batch, past + count), "kv_length": length}
            output, made = self._run_step(call, cache)
            memory.advance(count)
        if made:
            _fill_cross(cache, made)
        return output

    def _run_step(self, call: dict[str, Any], cache: Any) -> Any:
        from turbotx.capture.cached_call import CACHE

        variant, outputs = self.run_flat((), call)
        leaves = [cache if type(x) is str and x == CACHE else x for x in outputs]
        return variant.build_output(leaves)

    def _learn_shapes(self, call: dict[str, Any], batch: int, length: torch.Tensor) -> None:
        """Capture a call over memory of any size: the graph tells which size it takes."""
        for _ in range(2):
            memory = torch.zeros(1, batch, length.shape[0], dtype=self.dtype, device=self.device)
            try:
                self.check((), {**call, "kv_memory": memory, "kv_length": length})
                return
            except _OtherDtypeError as error:
                self.dtype = error.dtype
        raise CaptureError("the model's keys and values have a dtype that depends on the cache's")

    def make(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], outcomes: Outcomes = ()
    ) -> Compiled:
        """Capture and compile; no observer looks on, since it could not repeat a step."""
        return self.compile(self.capture(args, kwargs, outcomes))

    def capture(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], outcomes: Outcomes = ()
    ) -> Captured:
        """Return a call of an example's sizes as a graph; note what it writes to the cache."""
        from turbotx.capture.cached_call import find_appends

        captured = super().capture(args, make_example(kwargs), outcomes)
        nodes = find_appends(captured.graph_module.graph)
        parts: dict[int, list[torch.Tensor]] = {}
        for node in nodes:
            _, new, _, _, layer, *_ = cast(tuple[Any, ...], node.args)
            parts.setdefault(int(layer), []).append(new.meta["val"])
        layers = range(cast(int, self.model.layers))
        if sorted(parts) != list(layers) or any(len(p) != 2 for p in parts.values()):
            raise CaptureError(
                f"cannot capture {captured.name} with a cache: of its {len(layers)} layers, "
                f"{sorted(parts)} write keys and values"
            )
        dtypes = {x.dtype for pair in parts.values() for x in pair}
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
        self.shapes = shapes
        return captured


@functools.cache
def _names_of(cls: Hashable) -> list[str]:
    """Return the names of the arguments that a model's forward takes by place, less `self`."""
    parameters = inspect.signature(cls.forward).parameters.values()  # type: ignore[attr-defined]
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]


class _OtherDtypeError(Exception):
    """Keys and values are of another dtype than the memory that a call was traced with."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(str(dtype))
        self.dtype = dtype


def _is_cache(value: Any) -> bool:
    """Tell a cache of transformers, which is loaded where there is one."""
    module: Any = sys.modules.get("transformers.cache_utils")
    return module is not None and isinstance(value, module.Cache)


def _count_layers(model: nn.Module) -> int:
    from transformers.cache_utils import DynamicCache

    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise InputError(
            f"{type(model).__name__} is called with a key/value cache, and has no config of "
            "transformers that says how many layers it has: leave the cache out"
        )
    return len(DynamicCache(config=config.get_text_config(decoder=True)).layers)


def _kind_of(cache: Any) -> str:
    """Return which of `cached_call.KINDS` a call with this cache is."""
    updated = getattr(cache, "is_updated", None)
    if updated is None:
        return "decoder"
    states = set(updated.values())
    if len(states) > 1:
        raise InputError(
            "cross attention's keys and values are there for some layers of the cache only: call "
            "the model with a new EncoderDecoderCache"
        )
    return "further" if states == {True} else "first"


def _with_encoded(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with an encoder's outputs as the one tensor that they hold."""
    call = dict(given)
    outputs = call.get("encoder_outputs")
    if outputs is not None:
        parts = list(outputs.values() if isinstance(outputs, dict) else outputs)
        if len(parts) == 1 and isinstance(parts[0], torch.Tensor):
            del call["encoder_outputs"]
            call["kv_encoded"] = parts[0]
    return call


def _count_batch(call: dict[str, Any], kind: str) -> int:
    prefix = "" if kind == "decoder" else "decoder_"
    names = (f"{prefix}input_ids", f"{prefix}inputs_embeds")
    return next(int(call[n].shape[0]) for n in names if call.get(n) is not None)


def _cross_memory(cache: Any, batch: int, dtype: torch.dtype) -> torch.Tensor:
    """Return cross attention's keys and values as one tensor: (2 x layers, batch, heads, source,
    width)."""
    layers = cache.cross_attention_cache.layers
    made = [part for layer in layers for part in (layer.keys, layer.values)]
    memory = _adopt_cross(cache, made)
    source, shape = memory.length, memory.shapes[0]
    tensor = memory.tensor_for(batch, source)
    return tensor.view(2 * len(layers), batch, shape.heads, source, shape.key_width)


def _fill_cross(cache: Any, made: list[torch.Tensor]) -> None:
    """Keep what the first step has made of the encoder's outputs."""
    memory = _adopt_cross(cache, made)
    for k in range(len(made) // 2):
        memory.put(k, made[2 * k], made[2 * k + 1])
    cache.is_updated = dict.fromkeys(range(len(made) // 2), True)


def _adopt_cross(cache: Any, made: list[torch.Tensor]) -> CacheMemory:
    from turbotx.engine.cache_layers import adopt

    shapes = [
        LayerShape(k.shape[1], k.shape[3], v.shape[3])
        for k, v in zip(made[::2], made[1::2], strict=True)
    ]
    if len(set(shapes)) != 1 or shapes[0].key_width != shapes[0].value_width:
        raise InputError(f"cross attention's keys and values differ among layers: {shapes}")
    return adopt(cache.cross_attention_cache, shapes, made[0].dtype, made[0].device, grows=False)
