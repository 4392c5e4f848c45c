"""Shadow: a copy of the model that is traced in its place, so that the model stays unchanged.

In: a model. Out: modules of the same classes with the same tensors, whose dicts, lists and sets are
copies; other threads and later calls do not see what the trace writes there::

    shadow = Shadow(model)
    shadow.model.encoder.weight is model.encoder.weight  ->  True
    shadow.original_of(shadow.model.encoder) is model.encoder  ->  True

Methods, partials, weak references and closures that refer to a module of the model refer to its
copy. Other functions and objects are shared: `reach.py` finds what is written through them.
"""

from __future__ import annotations

import dis
import functools
import types
import weakref
from collections import defaultdict
from typing import Any

import torch
from torch import fx, nn

from turbotx.capture.code import codes_in
from turbotx.capture.module_state.values import MISSING, content_of
from turbotx.capture.sandbox.leaks import PLAIN
from turbotx.capture.sandbox.noted_dict import NotedDict
from turbotx.capture.sandbox.watched import CONTAINERS, DICTS, Watched

_KEPT = (*PLAIN, torch.Tensor)
_TABLES = frozenset(vars(nn.Module()))
"""The attributes of every module that belong to PyTorch."""


class Shadow:
    """model: the copy. watched: the copied containers, each with the user's own."""

    def __init__(self, model: nn.Module) -> None:
        self._copies: dict[int, Any] = {}
        self._originals: dict[int, Any] = {}
        self._alive: list[Any] = []  # keeps ids valid: an id may be reused once its owner dies
        self.watched: list[Watched] = []
        self.shared: list[tuple[Any, str]] = []
        """Functions and other objects among the attributes and hooks, which may run or be written
        to, with their locations."""
        self._paths = {id(m): name for name, m in model.named_modules()}
        self._cells: dict[int, tuple[types.CellType, types.CellType]] = {}
        self.model = self._copy(model, "")
        for cell, copied in self._cells.values():
            copied.cell_contents = self._copies.get(id(cell.cell_contents), cell.cell_contents)

    def original_of(self, value: Any) -> Any:
        """Return the user's object for a copy, and anything else as it is."""
        return self._originals.get(id(value), value)

    @property
    def copies(self) -> dict[int, Any]:
        """Everything that was copied, by id."""
        return {id(x): x for x in self._alive if id(x) in self._originals}

    def _remember(self, original: Any, copied: Any) -> None:
        self._copies[id(original)] = copied
        self._originals[id(copied)] = original
        self._alive += (original, copied)

    def _copy(self, value: Any, text: str) -> Any:
        kind = type(value)
        if id(value) in self._copies:
            return self._copies[id(value)]
        if isinstance(value, nn.Module):
            return self._copy_module(value, text)
        if kind in CONTAINERS:
            return self._copy_container(value, text)
        if isinstance(value, tuple):
            return self._copy_tuple(value, text)
        if kind is types.MethodType:
            owner = self._copy(value.__self__, text)
            if owner is not value.__self__:
                return types.MethodType(value.__func__, owner)
        elif kind is functools.partial:
            return self._copy_partial(value, text)
        elif kind is weakref.ref:
            target = value()
            if id(target) in self._copies:
                return weakref.ref(self._copies[id(target)])
        elif not isinstance(value, _KEPT):
            value = self._copy_function(value) if kind is types.FunctionType else value
            self.shared.append((value, text))
        return value

    def _copy_function(self, function: types.FunctionType) -> Any:
        """Copy a function whose closure refers to the model, as a hook's does, with a closure that
        refers to the copy. Returns the function itself if its closure does not, or if it sets
        enclosing variables."""
        cells = function.__closure__ or ()
        code = function.__code__
        leads_here = any(id(content_of(cell)) in self._paths for cell in cells)
        if not leads_here or _sets_variables_around(code):
            return function
        for cell in cells:
            if id(cell) not in self._cells and content_of(cell) is not MISSING:
                self._cells[id(cell)] = cell, types.CellType()
        closure = tuple(self._cells.get(id(cell), (cell, cell))[1] for cell in cells)
        scope, name = function.__globals__, function.__name__
        copied = types.FunctionType(code, scope, name, function.__defaults__, closure)
        copied.__kwdefaults__ = function.__kwdefaults__
        functools.update_wrapper(copied, function)
        copied.__dict__.pop("__wrapped__")
        copied.__dict__.update(function.__dict__)
        self._remember(function, copied)
        return copied

    def _copy_module(self, module: nn.Module, text: str) -> Any:
        if isinstance(module, torch.jit.ScriptModule):
            return module
        text = self._paths.get(id(module), text)
        copied = object.__new__(type(module))
        self._remember(module, copied)
        own = object.__getattribute__(module, "__dict__")
        if id(own) in self._copies:  # another object with the same state, as an optimized part is
            object.__setattr__(copied, "__dict__", self._copies[id(own)])
            return copied
        attributes = object.__getattribute__(copied, "__dict__")
        self._copies[id(own)] = attributes
        for name, value in own.items():
            attributes[name] = self._copy(value, f"{text}.{name}" if text else name)
        if not isinstance(module, fx.GraphModule):  # recompiles itself, writes nothing
            self.watched.append(Watched(own, attributes, text))
        return copied

    def _copy_container(self, value: Any, text: str) -> Any:
        if isinstance(value, defaultdict):
            copied: Any = defaultdict(value.default_factory)
        elif type(value) is dict and text.rpartition(".")[2] not in _TABLES:
            copied = NotedDict()
        else:
            copied = type(value)(maxlen=value.maxlen) if hasattr(value, "maxlen") else type(value)()
        self._remember(value, copied)
        if type(value) in DICTS:
            for key, item in value.items():
                copied[key] = self._copy(item, f"{text}[{key!r}]")
        elif isinstance(value, set):
            copied.update(self._copy(item, text) for item in value)
        else:
            copied.extend(self._copy(item, f"{text}[{k}]") for k, item in enumerate(value))
        table = text.rpartition(".")[2] in ("_parameters", "_buffers")
        self.watched.append(Watched(value, copied, text, exchanged=table))
        return copied

    def _copy_tuple(self, value: Any, text: str) -> Any:
        items = [self._copy(item, f"{text}[{k}]") for k, item in enumerate(value)]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        make: Any = getattr(type(value), "_make", type(value))
        return make(items)

    def _copy_partial(self, value: Any, text: str) -> Any:
        parts = (value.func, *value.args, *value.keywords.values())
        copied = [self._copy(part, text) for part in parts]
        if all(a is b for a, b in zip(parts, copied, strict=True)):
            return value
        count = len(value.args)
        named = dict(zip(value.keywords, copied[count + 1 :], strict=True))
        made = functools.partial(copied[0], *copied[1 : count + 1], **named)
        vars(made).update(vars(value))
        return made


def _sets_variables_around(code: types.CodeType) -> bool:
    """Return whether code sets a variable of an enclosing function, which other functions may
    read."""
    around = set(code.co_freevars)
    return any(
        step.opname in ("STORE_DEREF", "DELETE_DEREF") and step.argval in around
        for inner in codes_in(code)
        for step in dis.get_instructions(inner)
    )
