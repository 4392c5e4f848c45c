"""Cached engine: runs a decoder's calls with a key/value cache; one capture serves every length.

In: a call with a DynamicCache, or an EncoderDecoderCache of two, as transformers' `generate` makes
it. Out: the model's output, holding the same cache object, one step longer::

    engine((), {"input_ids": ids, "past_key_values": DynamicCache(), "use_cache": True})
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from typing import Any, cast

from torch import nn

from turbotx.capture.cache_argument import (
    ARGUMENT,
    is_new_cache,
    names_of,
    new_cache,
    split_cache,
)
from turbotx.capture.decisions import UndecidedError
from turbotx.capture.returned import ReturnedObjectError
from turbotx.engine.engine import Engine
from turbotx.errors import CaptureError, InputError
from turbotx.memory.cache_blocks import CacheBudget
from turbotx.options import Options


def make_engine(model: nn.Module, options: Options) -> Engine:
    """Return the engine of a model: a `CachedEngine` if its forward has a cache argument."""
    try:
        names = inspect.signature(type(model).forward).parameters
    except (TypeError, ValueError):  # not a Python function
        return Engine(model, options)
    return (CachedEngine if ARGUMENT in names else Engine)(model, options)


class CachedEngine(Engine):
    """An engine whose calls may take a transformers cache.

    budget: the memory limit shared by all of the model's caches.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        self.budget = CacheBudget(options.max_cache_nbytes)
        self._giving: dict[Any, type] = {}
        """The cache class that calls without a cache return, by kind of call."""

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call; one with a transformers cache runs as a step over turbotx's memory.

        Raises TrainingError in training mode.
        """
        given, cache = self.split(args, kwargs)
        if cache is not None:
            self.refuse_training()
            try:
                return self.steps().run(given, cache)
            except UndecidedError as error:
                self.count_eager(str(error))
                return self.run_eager(args, kwargs)
        if self._giving and (cls := self._giving.get(self._describe(args, kwargs))):
            return self._run_with_new_cache(cls, args, kwargs)
        try:
            return super().__call__(args, kwargs)
        except ReturnedObjectError as error:
            if not is_new_cache(error.kind):
                raise
            try:
                output = self._run_with_new_cache(error.kind, args, kwargs)
            except (CaptureError, InputError):
                raise error from None
            self._giving[self._describe(args, kwargs)] = error.kind
            return output

    def _describe(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return a key of what decides whether a call without a cache creates one."""
        uses = kwargs.get("use_cache"), getattr(self.model.config, "use_cache", None)
        return uses, len(args), *kwargs

    def _run_with_new_cache(self, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call that creates its own cache: pass a new one of class `cls`, which is
        returned."""
        self.refuse_training()
        given, cache = self.split(args, {**kwargs, ARGUMENT: new_cache(cls, self.model)})
        return self.steps().run(given, cache)

    def split(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """Return a call's arguments by name without the cache, and the cache; {} and None if it has
        none."""
        return split_cache(args, kwargs, lambda: names_of(cast(Hashable, type(self.model))))

    def steps(self) -> Any:
        """Return the `StepEngine` that runs calls with a cache, made on first use."""
        steps = self.parts.get("steps")
        if steps is None:
            from turbotx.engine.step_engine import StepEngine  # imported late: needs transformers

            with self._lock:
                made = StepEngine(self.model, self.options, self.budget)
                steps = self.parts.setdefault("steps", made)
            steps.tolerates = lambda: self.tolerates()
        return steps

    def reserve(self, **dims: int) -> None:
        """Map the memory of the largest shape, as `Engine.reserve`.

        Raises InputError if the model has only been called with a cache.
        """
        if "steps" in self.parts and not self.variants():
            raise InputError(
                "reserve maps memory for calls without a key/value cache, and there was none yet: "
                "memory for steps is mapped by the first one of the longest past"
            )
        super().reserve(**dims)

    def stats(self) -> dict[str, int]:
        """Return counts as `Engine.stats`, and the size of all caches."""
        return super().stats() | self.budget.stats()


def plain_call(
    engine: Engine, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Engine, tuple[Any, ...], Mapping[str, Any]]:
    """Return the engine that compiles a call, and the call in the form which that engine takes: a
    call with a cache becomes one of plain tensors, over a copy of the cache's memory."""
    if isinstance(engine, CachedEngine):
        if "kv_memory" in kwargs:
            return engine.steps(), args, kwargs
        given, cache = engine.split(args, kwargs)
        if cache is not None:
            engine.refuse_training()
            return engine.steps(), (), engine.steps().describe(given, cache)
    return engine, args, kwargs
