"""Callables: wrap a function, partial, bound method or callable object as a module to capture.

In: a callable that takes tensors. Out: a module that registers the modules and tensors held by the
callable, so that changes to them are detected like changes of a module's weights::

    as_module(bert.encode)     # bert becomes a submodule: its parameters are watched
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
"""How deeply nested objects of a callable are searched for tensors and modules."""


class FunctionModule(nn.Module):
    """A function of tensors as a module, so that everything is captured as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.turbotx_signature_of = function
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)


class _MethodModule(FunctionModule):
    """A bound method of a module; it is in training mode while that module is."""

    @property
    def training(self) -> bool:
        return bool(self.__dict__["function"].__self__.training)

    @training.setter
    def training(self, mode: bool) -> None:
        pass


def as_module(function: Callable[..., Any]) -> FunctionModule:
    """Return a module that calls `function`; its class has the function's name."""
    bound = isinstance(getattr(function, "__self__", None), nn.Module)
    kind = _MethodModule if bound else FunctionModule
    module = kind(function)
    called = function.func if isinstance(function, functools.partial) else function
    name = getattr(called, "__name__", type(called).__name__)
    module.__class__ = type(str(name), (kind,), {})
    return module


class CallableState:
    """The tensors and modules that a callable held when this object was made.

    For a bound method, the plain values of its object too: tracing does not record reads of them.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._entries = [e for e in _find(function, {}, 0) if type(e[2]) not in PLAIN]
        owner = function.__self__ if isinstance(function, types.MethodType) else None
        self._entries += [e for e in _find(owner, {}, 0) if type(e[2]) in PLAIN]

    def register(self, module: FunctionModule) -> None:
        """Register the held tensors as buffers and the held modules as submodules of `module`,
        replacing earlier ones."""
        for table in (module._buffers, module._modules):
            table.clear()
        for k, (_, _, value) in enumerate(self._entries):
            if isinstance(value, nn.Module):
                module.add_module(f"held_{k}", value)
            elif isinstance(value, nn.Parameter) or type(value) is torch.Tensor:
                module._buffers[f"held_{k}"] = value

    def have_changed(self) -> bool:
        """Return whether the callable now holds other objects. Changes inside the tensors and
        modules are detected by the guards on weights and module state."""
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
    """Yield (holder, key, value) for everything that a callable or container holds."""
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
    """Search the closure, defaults and referenced globals of a user's function."""
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
