"""Reach: the objects that a model's code can write to besides the model: globals, closures, caches.

In: a model, and the functions and objects among its attributes. Out: every container and object
that the code names, to be watched, and the location of every `functools.lru_cache`::

    forward of class Masked, which reads the global KEPT  ->  Watched(KEPT, "KEPT of masked.py")

The code is analyzed, not run: objects reached by names computed at run time are not found.
"""

from __future__ import annotations

import argparse
import functools
import threading
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from turbotx.capture.code import names_in
from turbotx.capture.module_state.values import MISSING, content_of, dict_of, is_library_or_sympy
from turbotx.capture.sandbox.leaks import find_leaks
from turbotx.capture.sandbox.watched import CONTAINERS, Watched

MAX_DEPTH = 4
"""The deepest nesting of containers and objects that is searched."""
MAX_ITEMS = 20_000
"""The most items that are visited in all; those beyond are not watched."""

_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
_CACHE = type(functools.lru_cache(lambda: None))


class Reach:
    """watched: containers, and the `__dict__`s of objects. caches: (namespace, name, lru_cache).
    loose: caches that are in no namespace, with their number of misses."""

    def __init__(
        self, model: nn.Module, shared: Iterable[tuple[Any, str]], known: dict[int, Any]
    ) -> None:
        """Search. shared: objects to visit, with their locations. known: objects already watched,
        by id."""
        self._waiting: list[tuple[Any, type | None]] = []
        self.watched: list[Watched] = []
        self.caches: list[tuple[Any, str, Any]] = []
        self.loose: list[tuple[Any, int]] = []
        self._seen = dict(known)
        self._left = MAX_ITEMS
        self._names: dict[Any, frozenset[str]] = {}
        for value, text in shared:
            self._visit(value, text, 0, frozenset())
        scope = nn.modules.module
        for hooks in (scope._global_forward_hooks, scope._global_forward_pre_hooks):
            for hook in list(hooks.values()):
                self._visit(hook, "a hook of all modules", 0, frozenset())
        for cls in dict.fromkeys(type(m) for m in model.modules()):
            self._visit_method(cls, "forward")
            self._visit_method(cls, "__call__")
        while self._waiting:
            self._look_at_function(*self._waiting.pop())

    def clear_loose(self) -> None:
        """Clear the caches that a trace added entries to, since single entries cannot be
        removed."""
        for k, (cache, misses) in enumerate(self.loose):
            if cache.cache_info().misses != misses:
                cache.cache_clear()
                self.loose[k] = (cache, 0)

    @contextmanager
    def past_caches(self) -> Iterator[None]:
        """Context manager: bypass each `lru_cache` in this thread for calls that return tensors or
        receive sizes, so that no cache keeps an object of a trace."""
        owner, replaced = threading.get_ident(), []
        for scope, name, cache in self.caches:
            raw = scope[name] if isinstance(scope, dict) else vars(scope)[name]
            made: Any = _pass_by(cache, owner)
            made = type(raw)(made) if isinstance(raw, (staticmethod, classmethod)) else made
            _put(scope, name, made)
            replaced.append((scope, name, raw))
        try:
            yield
        finally:
            for scope, name, raw in replaced:
                _put(scope, name, raw)

    def _is_new(self, value: Any) -> bool:
        if id(value) in self._seen or self._left <= 0:
            return False
        self._seen[id(value)] = value
        self._left -= 1
        return True

    def _visit(self, value: Any, text: str, depth: int, names: frozenset[str]) -> None:
        """Visit a value that code with these `names` in it may write to or run."""
        kind = type(value)
        if kind is types.FunctionType:
            self._visit_function(value, None)
        elif kind is _CACHE:
            if self._is_new(value):
                self.loose.append((value, value.cache_info().misses))
            self._visit(value.__wrapped__, text, depth, names)
        elif kind is types.MethodType:
            self._visit(value.__func__, text, depth, names)
            self._visit(value.__self__, text, depth + 1, names)
        elif kind is functools.partial:
            for part in (value.func, *value.args, *value.keywords.values()):
                self._visit(part, text, depth + 1, names)
        elif kind in CONTAINERS:
            self._visit_container(value, text, depth, names)
        elif isinstance(value, type):
            if not is_library_or_sympy(value.__module__):
                self._visit_class(value, names)
        elif kind is types.ModuleType:
            if depth <= MAX_DEPTH and not is_library_or_sympy(value.__name__):  # no cycles
                self._visit_scope(vars(value), value.__name__, depth, names)
        elif depth <= MAX_DEPTH and _is_users_object(value) and self._is_new(value):
            attributes = object.__getattribute__(value, "__dict__")
            self.watched.append(Watched(attributes, attributes, text))
            module = isinstance(value, nn.Module)
            depth = 0 if module else depth
            self._visit_method(kind, "forward" if module else "__call__")
            for name, item in list(attributes.items()):
                self._visit(item, f"{text}.{name}", depth + 1, names)

    def _visit_container(self, value: Any, text: str, depth: int, names: frozenset[str]) -> None:
        if depth > MAX_DEPTH or not self._is_new(value):
            return
        self.watched.append(Watched(value, value, text))
        items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        self._left -= len(items)
        for key, item in items[: max(self._left, 0)]:
            self._visit(item, f"{text}[{key!r}]", depth + 1, names)

    def _visit_class(self, cls: type, names: frozenset[str]) -> None:
        """Visit the attributes of a class that code names: tables shared by all its objects, and
        methods."""
        for base in cls.__mro__:
            if not is_library_or_sympy(base.__module__):
                self._visit_scope(vars(base), base.__qualname__, 0, names, base)

    def _visit_scope(
        self, scope: Any, text: str, depth: int, names: frozenset[str], cls: type | None = None
    ) -> None:
        for name in names:
            if name not in scope:
                continue
            value = scope[name]
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            elif isinstance(value, property):
                value = value.fget
            if type(value) is _CACHE:
                if not is_library_or_sympy(value.__wrapped__.__module__) and self._is_new(value):
                    self.caches.append((cls or scope, name, value))
                value = value.__wrapped__
            if type(value) is types.FunctionType:
                self._visit_function(value, cls)
            elif cls is None or type(value) in CONTAINERS:
                self._visit(value, f"{name} of {text}", depth + 1, names)

    def _visit_method(self, cls: type, name: str) -> None:
        for base in cls.__mro__:
            found = vars(base).get(name)
            if isinstance(found, types.FunctionType):
                self._visit_function(found, cls)
                return

    def _visit_function(self, function: Any, cls: type | None) -> None:
        """Queue a function, since chains of functions that name each other are long."""
        self._waiting.append((function, cls))

    def _look_at_function(self, function: Any, cls: type | None) -> None:
        """Visit what a function names; `cls`: the class whose method it is."""
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None and type(wrapped) is types.FunctionType:
            self._visit_function(wrapped, cls)
        if is_library_or_sympy(function.__module__) or not self._is_new(function):
            return
        code = function.__code__
        names = self._names.setdefault(code, frozenset(names_in(code)))
        for cell, name in zip(function.__closure__ or (), code.co_freevars, strict=True):
            value = content_of(cell)
            if value is not MISSING:
                self._visit(value, f"{name} around {function.__qualname__}", 0, names)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._visit(value, f"a default of {function.__qualname__}", 0, names)
        self._visit_scope(function.__globals__, str(function.__module__), 0, names)
        if cls is not None:
            self._visit_class(cls, names)


def _put(scope: Any, name: str, value: Any) -> None:
    if isinstance(scope, dict):
        scope[name] = value
    else:
        type.__setattr__(scope, name, value)


def _pass_by(cache: Any, owner: int) -> Any:
    @functools.wraps(cache)
    def call(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != owner:
            return cache(*args, **kwargs)
        given = find_leaks((args, kwargs), most=1, limit=1000)
        made = cache.__wrapped__(*args, **kwargs)
        # A result without objects of a trace comes from the cache: its identity may matter.
        return made if given or find_leaks(made, most=1, limit=1000) else cache(*args, **kwargs)

    for name in ("cache_info", "cache_clear", "cache_parameters"):
        setattr(call, name, getattr(cache, name))
    return call


def _is_users_object(value: Any) -> bool:
    kind = type(value)
    if isinstance(value, (torch.jit.ScriptModule, fx.GraphModule, torch.Tensor, BaseException)):
        return False
    known = isinstance(value, nn.Module) or kind in _NAMESPACES
    known |= kind.__module__.startswith("torch.distributions.")  # which keep what they compute
    if is_library_or_sympy(kind.__module__) and not known:
        return False
    return type(dict_of(value)) is dict
