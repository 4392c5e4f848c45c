"""Tracing: a process-wide lock around traces, so that other threads do not see their patches.

In: a piece of work that traces. Out: the same work, holding the process's one lock; what PyTorch's
tracer replaces for everybody meanwhile is replaced here for the tracing thread alone::

    with tracing():
        exported = torch.export.export(flat, examples, strict=False)

That is `nn.Module.__call__`, and the answers of `torch.compiler.is_compiling()` and the like, by
which models choose between ways of computing. The lock is reentrant, and
waits there for no engine's lock: an optimized model that a traced one calls runs as it was written.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn

_lock = threading.RLock()
_active = threading.local()


@contextmanager
def tracing() -> Iterator[None]:
    """Hold the lock of traces inside the context, and make PyTorch's replacements of `nn.Module`'s
    methods act in this thread alone."""
    with _lock:
        if getattr(_active, "inside", False):
            yield
            return
        _active.inside = True
        try:
            # Private parts of PyTorch, the same from 2.11 to 2.14: without one, other threads meet
            # what it does to the process.
            tracer: Any = import_module("torch.fx._symbolic_trace")
            export: Any = import_module("torch.export._trace")
            with ExitStack() as stack:
                if hasattr(tracer, "_Patcher"):
                    stack.enter_context(_replaced(tracer._Patcher, "patch_method", _limit_patches))
                if hasattr(export, "_compiling_state_context"):
                    stack.enter_context(
                        _replaced(export, "_compiling_state_context", _limit_context)
                    )
                yield
        finally:
            _active.inside = False


def limit_flags() -> None:
    """Make PyTorch's notes that a trace is under way, where they are set, mean this thread."""
    tracer: Any = import_module("torch.fx._symbolic_trace")
    for scope, name in (
        (torch.compiler, "_is_compiling_flag"),
        (torch.compiler, "_is_exporting_flag"),
        (tracer, "_is_fx_tracing_flag"),
    ):
        if getattr(scope, name, False) is True:
            setattr(scope, name, _InThread())


class _InThread:
    """True in the thread that made it, False in others."""

    def __init__(self) -> None:
        self._owner = threading.get_ident()

    def __bool__(self) -> bool:
        return threading.get_ident() == self._owner

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    __hash__ = object.__hash__

    def __or__(self, other: Any) -> Any:
        return bool(self) | other

    def __and__(self, other: Any) -> Any:
        return bool(self) & other

    __ror__, __rand__ = __or__, __and__


@contextmanager
def replaced_in_thread(scope: Any, name: str, new: Callable[..., Any]) -> Iterator[None]:
    """Let calls of what `scope` has as `name` be calls of `new` inside the context, those of this
    thread alone."""
    owner = threading.get_ident()
    with _replaced(scope, name, lambda before: _in_thread(owner, new, before)):
        yield


@contextmanager
def _replaced(scope: Any, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    before = getattr(scope, name)
    setattr(scope, name, change(before))
    try:
        yield
    finally:
        setattr(scope, name, before)


def _limit_context(context: Any) -> Any:
    @contextmanager
    def limited() -> Iterator[None]:
        with context():
            limit_flags()
            yield

    return limited


def _limit_patches(patch: Any) -> Any:
    owner = threading.get_ident()

    @functools.wraps(patch)
    def patch_method(
        self: Any, cls: type, name: str, new: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        # Another thread may trace something of its own, by PyTorch: what it patches is its own.
        if cls is nn.Module and threading.get_ident() == owner:
            new = _in_thread(owner, new, getattr(cls, name))
        return patch(self, cls, name, new, *args, **kwargs)

    return patch_method


def _in_thread(
    owner: int, new: Callable[..., Any], before: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(before, updated=())  # of a class, attributes are not the function's
    def choose(*args: Any, **kwargs: Any) -> Any:
        return (new if threading.get_ident() == owner else before)(*args, **kwargs)

    return choose
