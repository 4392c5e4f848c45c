"""Sandbox: runs user code under a trace on copies, so that none of its changes remain.

In: a model. Out: a copy of it to trace, and the side effects of the traced call; everything else
that the code wrote to is restored, however the trace ends::

    with sandbox.held():
        exported = torch.export.export(flat, examples)     # flat.forward: begin, model, finish
    sandbox.effects  ->  (Effect(kept, Put("mask", ...)),)
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.nn.utils import parametrize

from turbotx.capture.module_state.attribute_methods import active
from turbotx.capture.returned_arguments import ReturnedContainer
from turbotx.capture.sandbox.effects import Effect, SizesNeeded, find_effects
from turbotx.capture.sandbox.reach import Reach
from turbotx.capture.sandbox.shadow import Shadow
from turbotx.capture.sandbox.watched import by_identity
from turbotx.capture.tracing import limit_flags
from turbotx.ir.expr import expr


class Sandbox:
    """model: the copy to trace. out_spec, returned, constants, effects: of the latest run of the
    code."""

    out_spec: pytree.TreeSpec
    returned: tuple[ReturnedContainer, ...]
    constants: dict[int, Any]

    def __init__(self, model: nn.Module) -> None:
        self._shadow = Shadow(model)
        self._reach = Reach(model, self._shadow.shared, self._shadow.copies)
        elsewhere = {id(w.target) for w in self._reach.watched}
        for watched in self._shadow.watched:
            watched.shared = id(watched.target) in elsewhere
        self._watched = [*self._shadow.watched, *self._reach.watched]
        self._followed = {id(w.traced) for w in self._watched}
        self._inputs: list[list[frozenset[str]]] = []
        self.model = self._shadow.model
        self.original_of = self._shadow.original_of
        self.effects: tuple[Effect, ...] = ()
        self.keeps: Callable[[Any, Any], bool] = lambda attributes, name: False
        """Guards an attribute that the code sets to what it was; returns whether it can be."""

    def follows(self, container: object) -> bool:
        """Return whether writes of the code to this container or `__dict__` are recorded."""
        return id(container) in self._followed

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context manager: on exit, restore everything that the code wrote to; caches are bypassed
        inside."""
        try:
            with self._reach.past_caches(), _parametrizations_anew(), _global_hooks_inside():
                yield
        finally:
            for watched in self._watched:
                watched.put_back()
            self._reach.clear_loose()

    def begin(self, tensors: Sequence[torch.Tensor]) -> None:
        """Start a run of the code on these tensors; a trace may run it more than once."""
        limit_flags()
        self._reach.clear_loose()
        for watched in self._watched:
            watched.begin()
        self._inputs = [[_symbols(size) for size in t.shape] for t in tensors]

    def look_around(self) -> tuple[list[Any], list[Any]]:
        """Return what the code can write to as it is now, by which objects lie there; and these,
        for the ids to mean something as long as they are kept."""
        kept = [watched.look() for watched in self._watched]
        return [by_identity(contents) for contents in kept], kept

    def finish(self) -> list[object]:
        """Return the tensors and sizes that the code's side effects store, and set `effects`."""
        symbols = frozenset(s for sizes in self._inputs for size in sizes for s in size)
        effects, results = find_effects(self._watched, self.original_of, symbols, self.keeps)
        self.effects = tuple(effects)
        return results

    def find_spelled(self, error: Exception) -> frozenset[tuple[int, int]]:
        """Return the (input, dim) pairs whose sizes the code used in a key of a dict, a set or a
        cache, which caused the error: they must be constants."""
        symbols: set[str] = set()
        if isinstance(error, SizesNeeded):
            symbols |= error.symbols
        elif isinstance(error, TypeError):
            trace: types.TracebackType | None = error.__traceback__
            while trace is not None:
                hashed = trace.tb_frame.f_locals.get("self")
                if trace.tb_frame.f_code.co_name == "__hash__" and hasattr(hashed, "node"):
                    symbols |= _symbols(hashed)
                trace = trace.tb_next
        return frozenset(
            (i, d)
            for i, sizes in enumerate(self._inputs)
            for d, size in enumerate(sizes)
            if size & symbols
        )


@contextmanager
def _parametrizations_anew() -> Iterator[None]:
    """Context manager: inside `torch.nn.utils.parametrize.cached()`, compute parametrized weights
    from their parameters, and leave none of this trace in PyTorch's cache of them."""
    cache = parametrize._cache
    before = dict(cache)
    cache.clear()
    try:
        yield
    finally:
        cache.clear()
        if parametrize._cache is cache:  # not left meanwhile, in another thread
            cache.update(before)


@contextmanager
def _global_hooks_inside() -> Iterator[None]:
    """Context manager: skip global module hooks in this thread unless a recorder is active, since
    the wrappers that PyTorch and turbotx put around the model for a trace are modules too."""
    thread = threading.get_ident()

    def inside(hook: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            on = getattr(active, "recorder", None) is not None
            return hook(*args, **kwargs) if on or threading.get_ident() != thread else None

        return run

    replaced = []
    module = nn.modules.module
    for hooks in (module._global_forward_hooks, module._global_forward_pre_hooks):
        for key, hook in list(hooks.items()):
            hooks[key] = inside(hook)
            replaced.append((hooks, key, hook))
    try:
        yield
    finally:
        for hooks, key, hook in replaced:
            if key in hooks:  # not removed meanwhile
                hooks[key] = hook


def _symbols(size: object) -> frozenset[str]:
    if isinstance(size, torch.SymInt):
        return frozenset(str(s) for s in expr(size).free_symbols)
    return frozenset()
