"""Unfollowed: writes to state that a program cannot reproduce; they are undone, and refused by
name.

In: the functions that a model's forward may run, and its classes, before a trace. Out: after it, an
error if a global, a variable of an enclosing function, a class attribute, a thread local or a
context variable has changed, or if an iterator could have been advanced::

    global calls; calls += 1  ->  CaptureError: its code sets 'calls' (0) to 1 ...
"""

from __future__ import annotations

import contextvars
import dis
import threading
import types
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from turbotx.capture.code import codes_in
from turbotx.capture.module_state.places import class_dict
from turbotx.capture.module_state.values import MISSING, content_of, is_library, set_in_class, show
from turbotx.errors import CaptureError

_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), torch.Tensor, list, dict, tuple, set,
    torch.SymInt, torch.SymFloat, torch.SymBool,
)  # fmt: skip


@dataclass(frozen=True)
class _Held:
    """A table of names, its contents before the trace, and how to set an entry."""

    text: str
    held: Callable[[], Mapping[str, Any]]
    put: Callable[[str, Any], None]
    before: Mapping[str, Any]


class Unfollowed:
    """The state before a trace of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._tables: dict[int, _Held] = {}
        self._iterators: list[Any] = []
        for cls in {c for m in model.modules() for c in type(m).__mro__}:
            if not is_library(cls.__module__):
                self._note(
                    cls,
                    f"{cls.__qualname__}.",
                    partial(class_dict, cls),
                    partial(set_in_class, cls),
                )

    def _note(self, owner: Any, text: str, held: Any, put: Any) -> None:
        self._tables.setdefault(id(owner), _Held(text, held, put, dict(held())))

    def note_functions(self, functions: Iterable[types.FunctionType]) -> None:
        """Record the globals and enclosing variables that functions set."""
        scopes: dict[int, tuple[dict[str, Any], set[str]]] = {}
        for function in functions:
            free = function.__code__.co_freevars
            cells = dict(zip(free, function.__closure__ or (), strict=True))
            for code in codes_in(function.__code__):
                for step in dis.get_instructions(code):
                    if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                        scope = function.__globals__
                        scopes.setdefault(id(scope), (scope, set()))[1].add(step.argval)
                    elif step.opname == "STORE_DEREF" and step.argval in cells:
                        cell, name = cells[step.argval], step.argval
                        read, put = partial(_in_cell, cell, name), partial(_put_in_cell, cell)
                        self._note(cell, "", read, put)
        for scope, names in scopes.values():
            read = partial(_some_of, scope, names)
            self._note(scope, "", read, partial(_put_in_dict, scope))

    def meet(self, value: Any) -> None:
        """Record an object that the code reaches."""
        if isinstance(value, threading.local):
            held = vars(value)  # of this thread
            self._note(value, "", partial(dict, held), partial(_put_in_dict, held))
        elif isinstance(value, contextvars.ContextVar):
            self._note(value, "", partial(_in_context, value), partial(_put_in_context, value))
        elif isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools"):
            self._iterators.append(value)

    @contextmanager
    def refused(self, name: str) -> Generator[None]:
        """Context manager: on exit, restore values, tensors and sizes that were set; then raise
        CaptureError for the model called `name` about the first one, unless another error is
        active."""
        try:
            yield
        except BaseException:
            self._put_back()
            raise
        for text, before, now in self._put_back():
            raise CaptureError(
                f"cannot capture {name}: its code sets {text!r} ({show(before)}) to {show(now)}, "
                "which a program cannot do for a global, a variable of an enclosing function, a "
                "class, a thread local or a context variable: keep it in an attribute of the module"
            )
        for found in self._iterators:
            raise CaptureError(
                f"cannot capture {name}: its code holds a {type(found).__name__}, which every call "
                "would advance: pass its values as an argument"
            )

    def _put_back(self) -> list[tuple[str, Any, Any]]:
        changed = []
        for table in self._tables.values():
            now = dict(table.held())
            for name in {*now, *table.before}:
                value, before = now.get(name, MISSING), table.before.get(name, MISSING)
                # Functions and modules are looked up once and cached: harmless.
                if value is not before and isinstance(value, _PLAIN) and name[:2] != "__":
                    table.put(name, before)
                    changed.append((table.text + name, before, value))
        return changed


def _some_of(scope: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {n: scope[n] for n in names if n in scope}


def _in_cell(cell: types.CellType, name: str) -> dict[str, Any]:
    value = content_of(cell)
    return {} if value is MISSING else {name: value}


def _in_context(variable: contextvars.ContextVar[Any]) -> dict[str, Any]:
    try:
        return {variable.name: variable.get()}
    except LookupError:
        return {}


def _put_in_context(variable: contextvars.ContextVar[Any], _: str, value: Any) -> None:
    if value is not MISSING:  # only the token of its setting could remove a value
        variable.set(value)


def _put_in_dict(held: dict[str, Any], name: str, value: Any) -> None:
    if value is MISSING:
        held.pop(name, None)
    else:
        held[name] = value


def _put_in_cell(cell: types.CellType, _: str, value: Any) -> None:
    if value is MISSING:
        del cell.cell_contents
    else:
        cell.cell_contents = value
