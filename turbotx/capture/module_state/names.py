"""Names: the globals and closure cells that functions refer to, found in their bytecode.

In: functions that run under a trace. Out: the location of each name's value (a module's globals, a
closure cell, a class), and in turn the functions that they call, in the user's code and in model
libraries; the code of PyTorch and Python is skipped::

    find_names([Encoder.forward])  ->  places of "EPS", "ACT2FN", "helper", helper's own ...

Nothing is run: a name in a branch that was not taken counts as read too.
"""

from __future__ import annotations

import builtins
import dis
import enum
import functools
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from turbotx.capture.code import codes_in
from turbotx.capture.module_state.places import (
    CellPlace,
    ClassPlace,
    DefaultsPlace,
    ItemPlace,
    StatePlace,
    find_in_class,
)
from turbotx.capture.module_state.values import MISSING, is_library, is_watchable

MAX_FUNCTIONS = 2000
"""The most functions analyzed for one model."""
_GLOBAL = frozenset(("LOAD_GLOBAL", "LOAD_NAME"))
_ATTRIBUTE = frozenset(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"))
_CLASS = frozenset(("type", "__class__", "cls"))
"""Names by which code gets an object's class, whose attributes it then reads unrecorded."""
_LAYERS = ("torch.nn.modules.", nn.functional.__name__)
_UNCALLED = frozenset(
    f"__{name}__"
    for name in (
        "repr", "str", "format", "del", "dir", "sizeof", "reduce", "reduce_ex", "getstate",
        "setstate", "copy", "deepcopy", "init_subclass", "class_getitem",
    )
)  # fmt: skip
"""Methods that Python calls only to print, copy, pickle or subclass."""


_HOLDERS = (types.ModuleType, types.FunctionType, enum.Enum)
"""What has a dict of its own and is told from others by identity, as an argument."""


def find_names(
    functions: Iterable[Any], meet: Callable[[Any], None], names: Names | None = None
) -> Names:
    """Visit functions and the functions they call; `meet` is called with every object that they
    name."""
    names = names or Names()
    names.meet = meet
    for function in functions:
        names.enter(function)
    names.work()
    return names


class Names:
    """What the functions analyzed so far refer to."""

    def __init__(self, given: Iterable[Any] = ()) -> None:
        """given: the leaves of a call's arguments. Of those that are told apart by identity, as
        classes and modules are, code may read attributes that no name leads to."""
        found = [x for x in given if isinstance(x, (type, *_HOLDERS)) and not is_library(_home(x))]
        self._holders = [x for x in found if not isinstance(x, type)]
        classes = (x if isinstance(x, type) else type(x) for x in found)
        self._classes = [x for x in dict.fromkeys(classes) if x not in _HOLDERS]
        self.places: dict[Any, StatePlace] = {}
        self.meet: Callable[[Any], None] = lambda value: None
        self._entered: dict[tuple[int, type | None], types.FunctionType] = {}
        self._to_do: list[tuple[types.FunctionType, type | None]] = []
        for value in (*self._holders, *self._classes):
            self.enter(value)

    @property
    def codes(self) -> list[types.CodeType] | None:
        """The code of all analyzed functions; None if there were too many."""
        if len(self._entered) >= MAX_FUNCTIONS:
            return None
        return [code for f in self.functions for code in codes_in(f.__code__)]

    @property
    def functions(self) -> list[types.FunctionType]:
        """All analyzed functions."""
        return list({id(f): f for f in self._entered.values()}.values())

    def enter(self, value: Any, owner: type | None = None) -> None:
        """Queue a function for analysis, with the class whose method it is."""
        for function in _functions_in(value):
            key = (id(function), owner)
            known = key in self._entered or len(self._entered) >= MAX_FUNCTIONS
            if not known and (_is_layer(function) or not is_library(function.__module__)):
                self._entered[key] = function
                self._to_do.append((function, owner))

    def work(self) -> None:
        """Analyze all queued functions."""
        while self._to_do:
            function, owner = self._to_do.pop()
            for cell_name, cell in zip(
                function.__code__.co_freevars, function.__closure__ or (), strict=True
            ):
                self._add(CellPlace(cell, cell_name, function.__qualname__))
            if any(isinstance(x, (dict, list, set)) for x in function.__defaults__ or ()):
                self._add(DefaultsPlace(function))
            named = function.__kwdefaults__ or {}
            for value in (*(function.__defaults__ or ()), *named.values()):
                if not isinstance(value, nn.Module):
                    self.meet(value)
            for code in codes_in(function.__code__):
                found = _chains(code)
                by_class = _CLASS & {*code.co_names, *code.co_varnames[:1]}
                attributes = [chain[0] for kind, chain in found if kind == "attribute"]
                for kind, chain in found:
                    if kind == "global":
                        self._follow(function.__globals__, chain)
                    elif kind == "import":
                        self._import(chain[0], attributes)
                    else:
                        self._follow_given(chain)
                        if owner is not None:
                            self._follow_method(owner, chain, bool(by_class))
                            if "super" in code.co_names:
                                self._follow_bases(owner, chain)

    def _follow_given(self, chain: tuple[str, ...]) -> None:
        """Record what may be read from a class, module, function or enum among the arguments."""
        for cls in self._classes:
            if any(chain[0] in vars(c) and not is_library(c.__module__) for c in cls.__mro__):
                self._follow_method(cls, chain, True)
        for holder in self._holders:
            if chain[0] in vars(holder):
                self._follow(vars(holder), chain, str(getattr(holder, "__name__", holder)))

    def _follow_method(self, owner: type, chain: tuple[str, ...], by_class: bool) -> None:
        """Queue a method of a class. by_class: record that it is read from the class, too."""
        self.enter(find_in_class(owner, chain[0]), owner)
        if by_class and find_in_class(owner, chain[0]) is not MISSING:
            self._follow_class(owner, chain)

    def _follow_bases(self, owner: type, chain: tuple[str, ...]) -> None:
        """Record what `super()` finds in the bases of a class, and queue methods there."""
        for base in owner.__mro__[1:]:
            if chain[0] in vars(base) and not is_library(base.__module__):
                self._follow_class(base, chain)
                self.enter(vars(base)[chain[0]], owner)

    def _follow(self, scope: dict[str, Any], chain: tuple[str, ...], home: str = "") -> None:
        """Record a global's value, and what is read from it if it is a module or a class."""
        home = home or scope.get("__name__", "")
        for i, name in enumerate(chain):
            if name not in scope:
                if i == 0 and not hasattr(builtins, name):
                    self._add(ItemPlace(scope, name, f"{home}.{name}"))
                return
            value = scope[name]
            if isinstance(value, types.ModuleType):
                scope, home = vars(value), value.__name__
                continue
            if is_library(home) and (isinstance(value, type) or not callable(value)):
                return
            self._add(ItemPlace(scope, name, f"{home}.{name}"))
            if not isinstance(value, type) or i + 1 == len(chain) or is_library(value.__module__):
                return
            self._follow_class(value, chain[i + 1 :])
            return

    def _follow_class(self, cls: type, chain: tuple[str, ...]) -> None:
        """Record what is read from a class, and from a class nested in it."""
        for name in chain:
            place = ClassPlace(cls, name, f"{cls.__module__}.{cls.__qualname__}.{name}")
            self._add(place)
            cls = place.read()
            if not isinstance(cls, type):
                return

    def _import(self, name: str, used: Iterable[str]) -> None:
        """Record what code reads from a module that it imports locally."""
        module = sys.modules.get(name)
        if module is not None and not is_library(name):
            for attribute in used:
                if attribute in vars(module):
                    self._follow(vars(module), (attribute,))

    def _add(self, place: StatePlace) -> None:
        if place.key in self.places:
            return
        self.places[place.key] = place
        value = place.read()
        if value is MISSING or isinstance(value, nn.Module):
            return
        self.meet(value)
        self.enter(value)


def _home(value: Any) -> str:
    return str(value.__name__ if isinstance(value, types.ModuleType) else value.__module__)


def _is_layer(function: types.FunctionType) -> bool:
    """Return whether a function belongs to PyTorch's layers, or to what they call, as multi-head
    attention does: they call functions that a user may replace."""
    home = function.__module__ or ""
    return home.startswith(_LAYERS) and home != nn.Module.__module__


def _functions_in(value: Any, depth: int = 0) -> Iterable[types.FunctionType]:
    """Yield the functions behind a callable, or in a container of callables."""
    if isinstance(value, (types.MethodType, staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        yield from (f for f in (value.fget,) if isinstance(f, types.FunctionType))
    elif isinstance(value, functools.partial):
        yield from _functions_in(value.func, depth + 1)
    elif isinstance(value, types.FunctionType):
        yield value
    elif isinstance(value, functools._lru_cache_wrapper):
        yield from _functions_in(value.__wrapped__, depth + 1)
    elif isinstance(value, type) or is_watchable(type(value)):
        # Methods that Python calls implicitly: __call__, __getitem__, __init__ ...
        for cls in (value if isinstance(value, type) else type(value)).__mro__:
            if not is_library(cls.__module__):
                for name, held in vars(cls).items():
                    called = name.startswith("__") and name not in _UNCALLED
                    if called and isinstance(held, types.FunctionType):
                        yield held
    elif isinstance(value, (dict, list, tuple)) and depth < 3:
        for item in list(value.values() if isinstance(value, dict) else value):
            yield from _functions_in(item, depth + 1)


@functools.cache
def _chains(code: types.CodeType) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the globals that code loads, each with the attributes read directly from it, and the
    other attributes and modules: ("global", ("settings", "EPS")), ("attribute", ("scale",))."""
    found: dict[tuple[str, tuple[str, ...]], None] = {}
    chain: list[str] = []
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            found["import", (step.argval,)] = None
        if step.opname in _ATTRIBUTE or step.opname == "IMPORT_FROM":
            if chain:
                chain.append(step.argval)
            else:
                found["attribute", (step.argval,)] = None
            continue
        if chain and step.opname not in ("CACHE", "PRECALL"):
            found["global", tuple(chain)] = None
            chain = []
        if step.opname in _GLOBAL:
            chain = [step.argval]
    return tuple(found)
