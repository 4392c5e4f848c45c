"""Callables: a function, partial, bound method or callable object as a module to be captured.

In: something that is called with tensors. Out: a module whose submodules and buffers are what the
callable holds, so that a change of these is seen as a change of a module's weights is::

    as_module(bert.encode)     # bert is a submodule of it: its parameters are watched
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from turbotx.capture.code import names_in
from turbotx.capture.sandbox.leaks import PLAIN

_DEEPEST = 3
"""How many objects lie between a callable and the tensors that are looked for in it."""


class FunctionModule(nn.Module):
    """A function of tensors as a module, so that there is one way to capture."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.turbotx_signature_of = function
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function does."""
        return self.function(*args, **kwargs)


class _MethodModule(FunctionModule):
    """A bound method of a module: in training mode while that module is."""

    @property
    def training(self) -> bool:
        return bool(self.__dict__["function"].__self__.training)

    @training.setter
    def training(self, mode: bool) -> None:
        pass


def as_module(function: Callable[..., Any]) -> FunctionModule:
    """Return a module that calls `function`, of a class of the function's name."""
    bound = isinstance(getattr(function, "__self__", None), nn.Module)
    kind = _MethodModule if bound else FunctionModule
    module = kind(function)
    called = function.func if isinstance(function, functools.partial) else function
    name = getattr(called, "__name__", type(called).__name__)
    module.__class__ = type(str(name), (kind,), {})
    return module


class CallableState:
    """Tensors and modules that a callable holds, as they were when this was made.

    Of the object that a bound method is of, numbers too: a trace sees neither it nor them read.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._entries = [e for e in _find(function, {}, 0) if type(e[2]) not in PLAIN]
        owner = function.__self__ if isinstance(function, types.MethodType) else None
        self._entries += [e for e in _find(owner, {}, 0) if type(e[2]) in PLAIN]

    def register(self, module: FunctionModule) -> None:
        """Make tensors buffers and modules submodules of `module`, in place of earlier ones."""
        for table in (module._buffers, module._modules):
            table.clear()
        for k, (_, _, value) in enumerate(self._entries):
            if isinstance(value, nn.Module):
                module.add_module(f"held_{k}", value)
            elif isinstance(value, nn.Parameter) or type(value) is torch.Tensor:
                module._buffers[f"held_{k}"] = value

    def have_changed(self) -> bool:
        """Return whether the callable holds others now; what lies inside the tensors and modules is
        watched as weights are."""
        for holder, key, value in self._entries:
            now = _read(holder, key)
            is_equal = (
                type(now) is type(value) and type(value) in PLAIN and repr(now) == repr(value)
            )
            if now is not value and not is_equal:
                return True
        return False


_MISSING = object()


def _read(holder: Any, key: Any) -> Any:
    try:
        return holder.cell_contents if isinstance(holder, types.CellType) else holder[key]
    except (KeyError, IndexError, ValueError):
        return _MISSING


def _find(value: Any, seen: dict[int, Any], depth: int) -> Iterator[tuple[Any, Any, Any]]:
    """Give (where, key, what) for all that a callable or a container holds."""
    if id(value) in seen or depth > _DEEPEST or isinstance(value, (nn.Module, torch.Tensor)):
        if depth == 0 and isinstance(value, nn.Module):
            yield (value,), 0, value
        return
    seen[id(value)] = value
    if isinstance(value, functools.partial):
        inside = (value.func, *value.args)
        yield from _look(inside, range(len(inside)), seen, depth)
        yield from _look(value.keywords, value.keywords, seen, depth)
    elif isinstance(value, types.MethodType):
        yield from _look((value.__self__, value.__func__), (0, 1), seen, depth)
    elif isinstance(value, types.FunctionType):
        yield from _find_in_function(value, seen, depth)
    elif isinstance(value, (list, tuple)):
        yield from _look(value, range(len(value)), seen, depth)
    elif isinstance(value, dict):
        yield from _look(value, list(value), seen, depth)
    elif not isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
        yield from _look(getattr(value, "__dict__", {}), None, seen, depth)


def _find_in_function(
    function: types.FunctionType, seen: dict[int, Any], depth: int
) -> Iterator[tuple[Any, Any, Any]]:
    """Look into what a function of the user's closes over, its defaults and its globals."""
    wrapped = getattr(function, "__wrapped__", None)
    if (function.__module__ or "").split(".")[0] == "torch" and wrapped is None:
        return
    for cell in function.__closure__ or ():
        yield from _look_at(cell, None, seen, depth)
    yield from _look(function.__defaults__ or (), None, seen, depth)
    yield from _look(function.__kwdefaults__ or {}, None, seen, depth)
    names = [n for n in names_in(function.__code__) if n in function.__globals__]
    yield from _look(function.__globals__, names, seen, depth)


def _look(holder: Any, keys: Any, seen: dict[int, Any], depth: int) -> Iterator[Any]:
    if keys is None:
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
    for key in list(keys):
        yield from _look_at(holder, key, seen, depth)


def _look_at(holder: Any, key: Any, seen: dict[int, Any], depth: int) -> Iterator[Any]:
    value = _read(holder, key)
    if value is _MISSING:
        return
    if isinstance(value, (nn.Module, torch.Tensor)) or type(value) in PLAIN:
        yield holder, key, value
    else:
        yield from _find(value, seen, depth + 1)
