"""Places: locations of values that a trace read, readable again without running user code.

In: an owner and a name. Out: the value there now, and the dicts through which it was found; the
value can change only if one of them does::

    place = AttributePlace(encoder, "scale", "encoder.scale")
    place.read()    ->  1.0
    place.dicts()   ->  [encoder.__dict__]

A parameter or buffer is compared by what a trace sees of it (dtype, sizes, strides), since programs
read the tensor itself in every call; whether two names share a tensor is a place of its own
(`TiedPlace`).
"""

from __future__ import annotations

import gc
import types
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from turbotx.capture.module_state.recorder import ALL, TABLES
from turbotx.capture.module_state.values import (
    MAX_ITEMS,
    MISSING,
    Look,
    content_of,
    describe_own_tensor,
    describe_table,
    dict_of,
    held_by,
    is_library,
    is_watchable,
)


class StatePlace(ABC):
    """A location that a value was read from.

    text: what messages call it. key: equal for two places only if they are the same.
    """

    text: str
    key: tuple[Any, ...]

    @abstractmethod
    def read(self) -> Any:
        """Return the current value, or MISSING."""

    def dicts(self) -> list[dict[Any, Any]]:
        """Return the dicts that determine the value; none if that is compared in every call."""
        return []

    def describe(self, look: Look) -> Any:
        """Return a comparable description of the current value; records in `look` what it depends
        on."""
        look.watch(self.dicts())
        return look(self.read())


class AttributePlace(StatePlace):
    """An attribute of a module or an object, found as Python finds it, in the object or its class.

    A property is compared by identity: what it reads in turn is recorded as places too.
    """

    def __init__(self, owner: Any, name: str, text: str, inside: bool = True) -> None:
        """Set the place. inside: whether a module is part of the model; tensors of other modules
        are constants of a program."""
        self.owner, self.name, self.text, self._inside = owner, name, text, inside
        self.key = ("attribute", id(owner), name)
        own = isinstance(owner, nn.Module)
        getter: Any = type(owner).__getattribute__
        self._computed = not own and getter is not object.__getattribute__
        self._guessed = not own and hasattr(type(owner), "__getattr__")

    def read(self) -> Any:
        """Return the attribute's value now, or MISSING."""
        return self._find()[0]

    def dicts(self) -> list[dict[Any, Any]]:
        """Return the dicts of the object and of its classes that determine what is found."""
        return self._find()[1]

    def describe(self, look: Look) -> Any:
        """Return a comparable description; records in `look` the dicts that it depends on, and
        whether a slot, which has no version, is among them."""
        value, dicts = self._find()
        look.watch(dicts)
        in_class = find_in_class(type(self.owner), self.name)
        look.unversioned |= isinstance(in_class, types.MemberDescriptorType)
        if isinstance(self.owner, nn.Module) and self._inside:
            if self.name in TABLES and isinstance(value, dict):
                return describe_table(look, value)
            if isinstance(value, torch.Tensor) and in_class is MISSING:
                return describe_own_tensor(value)
        elif isinstance(self.owner, nn.Module) and isinstance(value, nn.Parameter):
            return look.place_of(value)  # programs track what it holds
        return look(value)

    def _find(self) -> tuple[Any, list[dict[Any, Any]]]:
        """Return the value and the dicts through which it was found."""
        owner, name = self.owner, self.name
        attributes = dict_of(owner)
        dicts = [attributes] if attributes is not None else []
        if self._computed:  # by the class's own __getattribute__ or __getattr__
            value, maker = getattr(owner, name, MISSING), find_in_class(type(owner), name)
            # The identity of an object that a property creates on each access means nothing.
            if isinstance(maker, property) and is_watchable(type(value)):
                value = value if getattr(owner, name, MISSING) is value else maker
            return value, [*dicts, *_class_dicts(type(owner))]
        if name == ALL:
            return attributes, dicts
        in_class = find_in_class(type(owner), name)
        if isinstance(in_class, types.MemberDescriptorType):
            try:
                return in_class.__get__(owner), dicts
            except AttributeError:
                return MISSING, dicts
        if in_class is not MISSING and _is_data_descriptor(in_class):
            return in_class, _class_dicts(type(owner), name)
        if attributes is not None and name in attributes:
            return attributes[name], dicts
        if in_class is not MISSING:
            return in_class, dicts + _class_dicts(type(owner), name)
        if isinstance(owner, nn.Module) and attributes is not None:
            for table in TABLES:
                held = attributes.get(table, {})
                dicts.append(held)
                if name in held:
                    return held[name], [dicts[0], held]
        value = getattr(owner, name, MISSING) if self._guessed else MISSING
        return value, dicts + _class_dicts(type(owner))


class OwnTensorsPlace(AttributePlace):
    """A list of a module's own parameters, or of weak references to them, that code sets to what it
    holds: compared by their names, since programs read the tensors themselves in every call."""

    def __init__(self, owner: nn.Module, name: str, text: str) -> None:
        super().__init__(owner, name, text)
        self.key = ("own tensors", id(owner), name)

    def describe(self, look: Look) -> Any:
        """Return the name of each tensor; records the list and the module's dicts in `look`."""
        value, dicts = self._find()
        tables = [vars(self.owner)[t] for t in TABLES[:2]]
        look.watch([*dicts, *tables])
        if type(value) is not list:
            return look(value)
        look.lists[id(value)] = value
        names = {id(x): name for table in tables for name, x in table.items() if x is not None}
        targets = [x() if type(x) is weakref.ref else x for x in value]
        return tuple(
            (type(x), names[id(t)] if id(t) in names else look(x))
            for x, t in zip(value, targets, strict=True)
        )


class ItemPlace(StatePlace):
    """A global of a Python module, or a class attribute: an entry of a dict."""

    def __init__(self, scope: dict[str, Any], name: str, text: str) -> None:
        self.scope, self.name, self.text = scope, name, text
        self.key = ("item", id(scope), name)

    def read(self) -> Any:
        """Return the entry's value now, or MISSING."""
        return self.scope.get(self.name, MISSING)

    def dicts(self) -> list[dict[Any, Any]]:
        """Return the dict with the entry."""
        return [self.scope]


class ClassPlace(StatePlace):
    """An attribute of a class, its own or inherited."""

    def __init__(self, cls: type, name: str, text: str) -> None:
        self.cls, self.name, self.text = cls, name, text
        self.key = ("class", cls, name)

    def read(self) -> Any:
        """Return the value under the name in the class or a base, or MISSING."""
        return find_in_class(self.cls, self.name)

    def dicts(self) -> list[dict[Any, Any]]:
        """Return the dicts of the classes up to the one that has the name."""
        return _class_dicts(self.cls, self.name)


class CallPlace(ClassPlace):
    """What calling a module of a class runs, which Python finds without asking the module."""

    def __init__(self, cls: type) -> None:
        super().__init__(cls, "__call__", f"{cls.__module__}.{cls.__qualname__}.__call__")

    def read(self) -> Any:
        """Return the class's `__call__`, without what a tracer puts around it meanwhile."""
        value = super().read()
        while hasattr(value, "__wrapped__") and is_library(value.__globals__.get("__name__")):
            value = value.__wrapped__
        return value


class DefaultsPlace(StatePlace):
    """A function's default values, some of which are mutable."""

    def __init__(self, function: types.FunctionType) -> None:
        self.function, self.text = function, f"defaults of {function.__qualname__}"
        defaults = function.__defaults__ or ()
        first = function.__code__.co_argcount - len(defaults)
        self.containers = [
            function.__code__.co_varnames[first + k]
            for k, x in enumerate(defaults)
            if isinstance(x, (dict, list, set))
        ]
        self.key = ("defaults", id(function))

    def read(self) -> Any:
        """Return the function's default values, a tuple or None."""
        return self.function.__defaults__


class CellPlace(StatePlace):
    """A variable of an enclosing function, in a closure cell."""

    def __init__(self, cell: types.CellType, name: str, home: str) -> None:
        self.cell, self.name, self.text = cell, name, f"{name} of {home}"
        self.key = ("cell", id(cell))

    def read(self) -> Any:
        """Return the contents of the closure cell, MISSING if it is empty."""
        return content_of(self.cell)

    def describe(self, look: Look) -> Any:
        """Return a comparable description; records the cell in `look`."""
        look.cells[id(self.cell)] = self.cell
        return look(self.read())


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a value: itself, or in containers, partials and the like."""
    seen, to_do = set[int](), [value]
    while to_do and len(seen) <= MAX_ITEMS:
        found = to_do.pop()
        if isinstance(found, torch.Tensor):
            yield found
        elif id(found) not in seen:
            seen.add(id(found))
            to_do += held_by(found)


class Ties:
    """Which names of modules share a tensor, as last read, and which other places hold it."""

    def __init__(self, places: Sequence[StatePlace]) -> None:
        self.places = places
        self._held: list[list[int]] = []
        self._names: dict[int, list[int]] = {}

    def look(self, mine: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return, for each tensor at the given places, all places that hold the same one. Reads
        only the given places, and all of them if a tensor there has changed."""
        if not self._held or any(self._held[i] != self._read(i) for i in mine):
            self._held = [self._read(i) for i in range(len(self.places))]
            self._names.clear()
            for i, held in enumerate(self._held):
                for key in held:
                    self._names.setdefault(key, []).append(i)
        return tuple(tuple(self._names[key]) for i in mine for key in self._held[i])

    def _read(self, i: int) -> list[int]:
        return [id(x) for x in tensors_in(self.places[i].read())]


class TiedPlace(StatePlace):
    """The other names of one module's tensors: code may test for them, and a graph reads a tensor
    by one of its names."""

    def __init__(self, ties: Ties, mine: Sequence[int]) -> None:
        """Set the place. mine: the indices of the module's places in `ties`."""
        self._ties, self._mine = ties, mine
        self.places = [ties.places[i] for i in mine]
        self.text = " and ".join(p.text for p in self.places)
        self.key = ("tied", *(p.key for p in self.places))

    def read(self) -> Any:
        """Return text that lists the other names of the tensors."""
        others = {i for group in self._ties.look(self._mine) for i in group} - {*self._mine}
        names = ", ".join(self._ties.places[i].text for i in sorted(others))
        return f"one tensor with {names}" if names else "no other's tensor"

    def dicts(self) -> list[dict[Any, Any]]:
        """Return the dicts of the module's places, including its tables."""
        tables = [x for p in self.places if isinstance(x := p.read(), dict)]
        return [*tables, *(d for p in self.places for d in p.dicts())]

    def describe(self, look: Look) -> Any:
        """Return the names of each tensor; records the dicts of the module in `look`."""
        look.watch(self.dicts())
        return self._ties.look(self._mine)


def find_in_class(cls: type, name: str) -> Any:
    """Return an attribute of a class as stored, unbound, or MISSING."""
    for base in cls.__mro__:
        held = _view_of(base)
        if name in held:
            return held[name]
    return MISSING


def class_dict(cls: type) -> dict[str, Any]:
    """Return the dict behind `cls.__dict__`, which is only a view of it."""
    found = gc.get_referents(_view_of(cls))[0]
    assert type(found) is dict
    return found


def _view_of(cls: type) -> Mapping[str, Any]:
    found: Mapping[str, Any] = type.__dict__["__dict__"].__get__(cls)
    return found


def _class_dicts(cls: type, name: str | None = None) -> list[dict[str, Any]]:
    """Return the dicts of a class and its bases, up to the one that has `name`."""
    found = []
    for base in cls.__mro__:
        if base.__module__ == "builtins":
            continue
        found.append(class_dict(base))
        if name is not None and name in found[-1]:
            break
    return found


def _is_data_descriptor(value: Any) -> bool:
    return hasattr(type(value), "__set__") or hasattr(type(value), "__delete__")
