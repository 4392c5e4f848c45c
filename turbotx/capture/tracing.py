"""Tracing: a process-wide lock around traces, which keeps their patches from other threads.

In: code that traces. Out: the same, while holding the process-wide lock; what PyTorch's tracer
patches globally is patched for the tracing thread only::

    with tracing():
        exported = torch.export.export(flat, examples, strict=False)

This concerns `nn.Module.__call__` and functions such as `torch.compiler.is_compiling()`, by which
models choose code paths. The lock is reentrant, and no engine's lock is taken while it is held: an
optimized model called by a traced one runs its original code.
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

from turbotx.ir.fake_results import forget_results

_lock = threading.RLock()
_active = threading.local()


@contextmanager
def tracing() -> Iterator[None]:
    """Context manager: hold the trace lock, and limit PyTorch's patches of `nn.Module` to this
    thread."""
    with _lock:
        if getattr(_active, "inside", False):
            yield
            return
        _active.inside = True
        try:
            # Private parts of PyTorch, the same from 2.11 to 2.14: without one, its patches
            # affect other threads.
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
            _forget_traces()


def _forget_traces() -> None:
    """Empty the process-wide tables of traces: of results, and PyTorch's of the nodes of the last
    export, which hold the model and its parameters, and of what shape environments answered."""
    forget_results()
    tracer: Any = import_module("torch.fx.experimental.proxy_tensor")
    shapes: Any = import_module("torch.fx.experimental.symbolic_shapes")
    getattr(tracer, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {}).clear()  # private
    for method in vars(shapes.ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()


def limit_flags() -> None:
    """Limit PyTorch's flags for an active trace, where set, to this thread."""
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
    """Context manager: in this thread, replace `name` of `scope` by `new` for calls."""
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
        # Another thread may trace with PyTorch directly; its patches are left alone.
        if cls is nn.Module and threading.get_ident() == owner:
            new = _in_thread(owner, new, getattr(cls, name))
        return patch(self, cls, name, new, *args, **kwargs)

    return patch_method


def _in_thread(
    owner: int, new: Callable[..., Any], before: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(before, updated=())  # without a class's attributes
    def choose(*args: Any, **kwargs: Any) -> Any:
        return (new if threading.get_ident() == owner else before)(*args, **kwargs)

    return choose
