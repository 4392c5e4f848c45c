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
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import nn

from turbotx.capture.module_state.attribute_methods import active
from turbotx.capture.module_state.places import CallPlace
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
            proxies: Any = import_module("torch.fx.experimental.proxy_tensor")
            with ExitStack() as stack:
                if hasattr(tracer, "_Patcher"):
                    stack.enter_context(_replaced(tracer._Patcher, "patch_method", _limit_patches))
                if hasattr(tracer, _CALL):
                    stack.enter_context(_replaced(tracer, _CALL, _call_as_replaced))
                if hasattr(export, "_compiling_state_context"):
                    stack.enter_context(
                        _replaced(export, "_compiling_state_context", _limit_context)
                    )
                stack.enter_context(_keep_hierarchy(export))
                if hasattr(torch._ops, _MODES):
                    own: Any = type(getattr(torch._ops, _MODES)())()
                    stack.enter_context(replaced_in_thread(torch._ops, _MODES, lambda: own))
                if hasattr(proxies, _LAST_TRACE):
                    stack.enter_context(_replaced(proxies, _LAST_TRACE, _TableByThread))
                yield
        finally:
            _active.inside = False
            _forget_traces()


def _forget_traces() -> None:
    """Empty the process-wide tables of traces: of results, and PyTorch's of what shape environments
    answered.

    Another thread may trace with PyTorch meanwhile. It then evaluates again what it asks again:
    PyTorch itself empties these tables whenever another environment asks, or drops what was asked
    256 questions before, so that every answer may be evaluated twice.
    """
    forget_results()
    shapes: Any = import_module("torch.fx.experimental.symbolic_shapes")
    for method in vars(shapes.ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()


_MODES = "mode_stack_state_for_pre_dispatch"
"""PyTorch's function that gives the modes of an export, which two threads must not share."""
_LAST_TRACE = "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT"
"""PyTorch's table of the nodes of the last trace, by which it names fake tensors that are left: it
holds the model and its parameters."""


_CALL = "_orig_module_call"
"""PyTorch's name for what a call of a module runs when it is not traced."""
_HIERARCHY = "_EXPORT_MODULE_HIERARCHY"
_READS_HIERARCHY = "_get_module_call_graph"


@contextmanager
def _keep_hierarchy(export: Any) -> Iterator[None]:
    """Context manager: where PyTorch exports in another thread, its table of the exported model's
    modules, which every export sets and empties, is what it was; this thread's need not be."""
    before, names = getattr(export, _HIERARCHY, None), vars(export)

    def read(*args: Any, **kwargs: Any) -> Any:
        if names.get(_HIERARCHY) is None:
            names[_HIERARCHY] = {"": ""}
        return plain(*args, **kwargs)

    plain = names.get(_READS_HIERARCHY)
    try:
        with replaced_in_thread(export, _READS_HIERARCHY, read) if plain else nullcontext():
            yield
    finally:
        if before is not None:
            names[_HIERARCHY] = before


class _TableByThread(MutableMapping[int, Any]):
    """A table of this thread's own, empty at first, which for other threads is the given one."""

    def __init__(self, others: MutableMapping[int, Any]) -> None:
        self._owner, self._own, self._others = threading.get_ident(), dict[int, Any](), others

    @property
    def _table(self) -> MutableMapping[int, Any]:
        return self._own if threading.get_ident() == self._owner else self._others

    def __getitem__(self, key: int) -> Any:
        return self._table[key]

    def __setitem__(self, key: int, value: Any) -> None:
        self._table[key] = value

    def __delitem__(self, key: int) -> None:
        del self._table[key]

    def __iter__(self) -> Iterator[int]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def clear(self) -> None:
        self._table.clear()


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


def _call_as_replaced(plain: Any) -> Any:
    """Return what runs a module's call: inside the model what stands in `nn.Module.__call__`, which
    the user may have replaced, and PyTorch's own for the wrappers around it."""
    now = CallPlace(nn.Module).read()

    @functools.wraps(plain)
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inside = getattr(active, "recorder", None) is not None
        return (now if inside else plain)(module, *args, **kwargs)

    return plain if now is plain else call


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
