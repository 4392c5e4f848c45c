"""Values: comparable descriptions of what a trace read, for detecting changes.

In: the value of an attribute, a global or a closure variable. Out: a description that is equal only
for values that a trace would treat the same, and the dicts and lists it came from::

    Look()(-0.0)        ->  (float, "-0x0.0p+0")        differs from 0.0, and nan equals itself
    Look()({"a": [1]})  ->  (dict, (((str, "a"), (list, ((int, 1),))),))

Constants are compared by type and value, containers by their contents, small numpy arrays by their
bytes, context variables and thread locals by their value for the caller; tensors, modules,
functions and other objects by identity. The attributes of an object are recorded when they are read
(`recorder.py`); those of classes that cannot be recorded this way, such as types.SimpleNamespace,
are compared with the object.
"""

from __future__ import annotations

import argparse
import array
import collections
import contextvars
import enum
import functools
import sys
import threading
import types
import weakref
from collections.abc import Collection, Iterable, Mapping
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from turbotx.capture.torchao_weights import scheme_of
from turbotx.ir.memory_order import has_version

MAX_DEPTH = 8
"""The deepest nesting of containers; deeper ones are compared by identity."""
MAX_ITEMS = 4096
"""The most items of one value in all, and elements of a numpy array; those beyond are compared by
identity."""

MISSING = enum.Enum("MISSING", "missing").missing  # type: ignore[attr-defined]
"""The value of an attribute that does not exist; hasattr looks for some."""

_EXACT = (bool, int, str, bytes, type(None), type(Ellipsis), range)
_CONSTANT = (torch.dtype, torch.device, torch.layout, torch.memory_format, enum.Enum)
_SEQUENCES = (list, tuple, collections.deque)
_SNAPSHOT = (
    types.SimpleNamespace, argparse.Namespace, collections.UserDict, collections.UserList,
    collections.UserString, collections.ChainMap, weakref.WeakKeyDictionary,
    weakref.WeakValueDictionary, weakref.WeakSet,
)  # fmt: skip
_LIBRARIES = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "triton", "turbotx"}
_HEAP_TYPE = 1 << 9

_BY_CONTEXT = (contextvars.ContextVar, threading.local)

unwatchable: set[type] = set()
"""Classes whose attribute methods cannot be replaced: their objects are compared as a whole."""


def dict_of(owner: Any) -> dict[str, Any] | None:
    """Return an object's own attributes; None if it has only slots."""
    try:
        found: dict[str, Any] = object.__getattribute__(owner, "__dict__")
        return found
    except AttributeError:
        return None


def content_of(cell: types.CellType) -> Any:
    """Return what a closure's cell holds, MISSING if it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def set_in_class(cls: type, name: str, value: Any) -> None:
    """Set an attribute of a class, whatever its metaclass; MISSING deletes it."""
    if value is MISSING:
        type.__delattr__(cls, name)
    else:
        type.__setattr__(cls, name, value)


@functools.cache
def is_library(name: str | None) -> bool:
    """Return whether a module belongs to Python, PyTorch or turbotx, not to the user or a library
    of models."""
    return name is None or name.partition(".")[0] in _LIBRARIES


@functools.cache
def is_library_or_sympy(name: str | None) -> bool:
    """Return whether a module is of a library, or of sympy, whose caches a trace writes to. Cached,
    since a trace asks a million times."""
    return is_library(name) or str(name).partition(".")[0] == "sympy"


def caller_outside(frame: FrameType | None, modules: Collection[str]) -> FrameType | None:
    """Return the first frame, from this one outwards, whose code is not of these modules; None if
    there is none."""
    while frame is not None and frame.f_globals.get("__name__") in modules:
        frame = frame.f_back
    return frame


def is_users(frame: FrameType | None) -> bool:
    """Return whether a frame runs code of the user or of a library of models."""
    return frame is not None and not is_library(frame.f_globals.get("__name__"))


def is_watchable(cls: type) -> bool:
    """Return whether reads of attributes of a class's objects can be recorded: classes of users and
    of model libraries, written in Python."""
    if not cls.__flags__ & _HEAP_TYPE or cls in unwatchable:
        return False
    if issubclass(cls, (nn.Module, torch.Tensor, enum.Enum, type, *_BY_CONTEXT)):
        return False
    return not is_library(getattr(cls, "__module__", None))


def _in_this_context(value: Any) -> dict[str, Any]:
    """Return what a context variable or a thread local holds in this context."""
    if isinstance(value, contextvars.ContextVar):
        try:
            return {"value": value.get()}
        except LookupError:
            return {}
    return dict(value.__dict__)  # a separate dict for each thread


def held_by(value: Any) -> list[Any]:
    """Return the parts of an object that Look describes with it: the items of a container, a
    partial's parts, a method's object, attributes whose reads are not recorded."""
    cls = type(value)
    held: list[Any] = []
    if isinstance(value, dict):
        held = [*dict.values(value)]
    elif isinstance(value, types.MappingProxyType):
        held = [*value.values()]
    elif isinstance(value, (*_SEQUENCES, set, frozenset)):
        held = [*value]
    elif isinstance(value, functools.partial):
        held = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.MethodType):
        return [value.__self__]
    elif isinstance(value, types.BuiltinMethodType):  # as a generator's `normal`
        return [] if isinstance(value.__self__, types.ModuleType) else [value.__self__]
    elif isinstance(value, weakref.ref):
        return [value()]
    elif cls in weakref.ProxyTypes:
        return [value.__repr__.__self__]
    elif isinstance(value, _BY_CONTEXT):
        return [*_in_this_context(value).values()]
    elif not isinstance(value, _SNAPSHOT) and cls not in unwatchable:
        return []
    if cls.__module__ != "builtins" and not is_watchable(cls):
        held += (getattr(value, "__dict__", None) or {}).values()
    return held


class Look:
    """Describes values; afterwards `dicts`, `lists`, `cells`, `tensors`, `sets` and `ordered` are
    the objects to watch, and `unversioned` says that some content can only be compared."""

    def __init__(self, left_out: Mapping[int, frozenset[Any] | None] | None = None) -> None:
        """Create a Look. left_out: by the id of a container, the keys to ignore, or None for all
        contents."""
        self._left_out = left_out or {}
        self.held: set[int] = set()  # every container that was described or ignored
        self.dicts: dict[int, dict[Any, Any]] = {}
        self.lists: dict[int, list[Any]] = {}
        self.cells: dict[int, types.CellType] = {}
        self.tensors: dict[int, torch.Tensor] = {}
        self.sets: dict[int, set[Any]] = {}
        self.ordered: dict[int, collections.OrderedDict[Any, Any]] = {}
        self.kept: list[Any] = []  # keeps ids valid
        self.unversioned = False
        self._items = 0
        self._open: dict[int, int] = {}

    def __call__(self, value: Any, depth: int = 0) -> Any:
        """Return a description of `value`: hashable parts, compared with ==."""
        cls = type(value)
        if cls in _EXACT:
            return cls, value
        if cls is float:
            return cls, value.hex()
        if cls is complex:
            return cls, value.real.hex(), value.imag.hex()
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, _CONSTANT):
            return cls, value
        if isinstance(value, (np.ndarray, np.generic)):
            return self._array(value)
        if isinstance(value, nn.Module) or depth > MAX_DEPTH or self._items > MAX_ITEMS:
            return self._which(value)
        if id(value) in self._open:
            return "again", self._open[id(value)]
        return self._contents(cls, value, depth)

    def watch(self, dicts: Iterable[dict[Any, Any]]) -> None:
        """Add dicts to watch for changes."""
        self.dicts |= {id(found): found for found in dicts}

    def _contents(self, cls: type, value: Any, depth: int) -> Any:
        """Describe a container, or an object that is treated as one."""
        self._open[id(value)] = len(self._open)
        self.held.add(id(value))
        hidden = self._left_out.get(id(value), frozenset())
        try:
            if hidden is None:
                return self._which(value)
            if isinstance(value, _BY_CONTEXT):
                self.unversioned = True  # set per thread or task, unseen
                held = _in_this_context(value)
                return cls, self._which(value), self._pairs(held.items(), depth)
            if isinstance(value, dict):
                self.dicts[id(value)] = value
                items: Iterable[tuple[Any, Any]] = dict.items(value)
                if isinstance(value, collections.OrderedDict) and len(value) > 1:
                    self.ordered[id(value)] = value  # move_to_end touches no dict
                    keys = collections.OrderedDict.__iter__(value)
                    items = [(k, dict.__getitem__(value, k)) for k in keys]
                if hidden:
                    self.kept.append(value)
                    items = [(k, v) for k, v in items if k not in hidden]
                    return cls, id(value), self._pairs(items, depth), self._own(value, depth)
                return cls, self._pairs(items, depth), self._own(value, depth)
            if isinstance(value, _SEQUENCES):
                if isinstance(value, list):
                    self.lists[id(value)] = value
                self.unversioned |= isinstance(value, collections.deque)
                return cls, self._each(value, depth), self._own(value, depth)
            if isinstance(value, types.MappingProxyType):
                self.unversioned = True  # the mapping behind it cannot be reached
                return cls, self._pairs(value.items(), depth)
            if isinstance(value, (bytearray, array.array)):
                self.unversioned = True
                return cls, getattr(value, "typecode", None), bytes(value)
            if isinstance(value, (set, frozenset)):
                if isinstance(value, set):
                    self.sets[id(value)] = value
                return cls, frozenset(self._each(value, depth))
            if isinstance(value, functools.partial):
                parts = (value.func, value.args, value.keywords)
                return cls, self._each(parts, depth)
            if isinstance(value, types.MethodType):  # created by each read
                return cls, self._which(value.__func__), self._which(value.__self__)
            if isinstance(value, slice):
                return cls, self._each((value.start, value.stop, value.step), depth)
            if isinstance(value, _SNAPSHOT):
                return cls, self._own(value, depth, always=True)
            if cls in unwatchable:
                return self._which(value), self._own(value, depth, always=True)
            return self._which(value)
        finally:
            del self._open[id(value)]

    def _own(self, value: Any, depth: int, always: bool = False) -> Any:
        """Describe attributes whose reads are not recorded."""
        if not always and (is_watchable(type(value)) or type(value).__module__ == "builtins"):
            return None
        attributes = getattr(value, "__dict__", None)
        return None if not attributes else self(attributes, depth + 1)

    def _pairs(self, items: Any, depth: int) -> tuple[Any, ...]:
        self._items += len(items)
        if self._items > MAX_ITEMS:
            return self._which_all([x for pair in items for x in pair])
        return tuple((self(k, depth + 1), self(v, depth + 1)) for k, v in list(items))

    def _each(self, values: Any, depth: int) -> tuple[Any, ...]:
        self._items += len(values)
        if self._items > MAX_ITEMS:
            return self._which_all(list(values))
        return tuple(self(v, depth + 1) for v in list(values))

    def _tensor(self, value: torch.Tensor) -> Any:
        """Describe a tensor that belongs to no module: a trace treats its values as constants."""
        if not has_version(value) or not _has_data(value):
            self.unversioned = True
            return self._which(value)
        self.tensors[id(value)] = value
        return self._which(value), value._version, value.data_ptr()

    def place_of(self, value: torch.Tensor) -> Any:
        """Describe a tensor by identity and memory address, regardless of its values."""
        described = self(value)
        return described[0], described[-1]

    def _array(self, value: Any) -> Any:
        if value.size > MAX_ITEMS or value.dtype.hasobject:
            return self._which(value)
        self.unversioned |= isinstance(value, np.ndarray)
        return type(value), value.dtype.str, value.shape, value.tobytes()

    def _which_all(self, values: list[Any]) -> tuple[Any, ...]:
        self.kept.append(values)
        return "are", *map(id, values)

    def _which(self, value: Any) -> tuple[str, int]:
        self.kept.append(value)
        return "is", id(value)


def describe_own_tensor(tensor: torch.Tensor | None) -> Any:
    """Describe a parameter or buffer of a module by what a trace sees of it, not by identity:
    programs pick up a replacement."""
    if tensor is None or not isinstance(tensor, torch.Tensor):
        return type(tensor), tensor if tensor is None else id(tensor)
    strides = tensor.stride() if tensor.layout is torch.strided else None
    kind = getattr(type(tensor), "stands_for", type(tensor))  # as of `PackedParameter`
    scheme = scheme_of(tensor)
    if scheme is not None:  # a trace is given floats that stand for it
        kind = nn.Parameter
    return kind, scheme, tensor.dtype, tensor.device, tuple(tensor.shape), strides


def describe_table(look: Look, table: Mapping[str, Any]) -> Any:
    """Describe a module's whole `_parameters`, `_buffers` or `_modules`."""
    look.dicts[id(table)] = table  # type: ignore[assignment]
    return tuple(
        (k, look(v) if isinstance(v, nn.Module) else describe_own_tensor(v))
        for k, v in table.items()
    )


def _has_data(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided


def show(value: Any) -> str:
    """Format a value for a message."""
    if value is MISSING:
        return "not there"
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    if isinstance(value, _BY_CONTEXT):
        held = ", ".join(f"{k} {show(v)}" for k, v in _in_this_context(value).items())
        return f"a {type(value).__name__} ({held})"
    text = repr(value) if type(value) in (*_EXACT, float, list, tuple, dict, set) else ""
    return text if text and len(text) <= 80 else f"a {type(value).__name__}"
