"""Attribute methods: replaces those of classes by ones that report to the active recorder.

In: a class. Out: the same class, whose `__getattribute__` and `__setattr__` (and `__init__`, of
nn.Module) tell `active.recorder` first, until it is released as often as it was patched::

    patch(nn.Module)
    active.recorder = recorder
    module.scale        # recorder.note_read(module, "scale")
    release(nn.Module)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import nn

from turbotx.capture.module_state.values import MISSING, set_in_class, unwatchable

active = threading.local()
"""`recorder`: the one of this thread, if it has one."""
_lock = threading.RLock()
patched: dict[type, int] = {}
"""The number of recorders that need a class's attribute methods replaced."""
saved_methods: dict[type, list[tuple[str, Any]]] = {}
_NOTES = "turbotx_notes"
"""Marks the methods made by `_noting`."""


def patch(cls: type) -> bool:
    """Replace a class's attribute methods by recording ones; returns whether to restore them later.

    A replacement made by another recorder is shared; inherited methods already record.
    """
    with _lock:
        if cls in patched:
            patched[cls] += 1
            return True
        made = {
            name: function
            for name, function in _noting(cls).items()
            if not hasattr(getattr(cls, name), _NOTES)
        }
        saved = [(name, cls.__dict__.get(name, MISSING)) for name in made]
        try:
            for name, function in made.items():
                setattr(function, _NOTES, True)
                type.__setattr__(cls, name, function)
        except TypeError:
            unwatchable.add(cls)
            return False
        if made:
            patched[cls] = 1
            saved_methods[cls] = saved
        return bool(made)


def _noting(cls: type) -> dict[str, Callable[..., Any]]:
    """Return methods that wrap a class's own and report to the active recorder: of attributes, and
    what makes an nn.Module."""
    get: Callable[..., Any] = cls.__getattribute__
    put: Callable[..., None] = cls.__setattr__
    make: Callable[..., None] = cls.__init__  # type: ignore[misc]

    def __getattribute__(self: Any, name: str) -> Any:
        recorder = getattr(active, "recorder", None)
        if recorder is not None:
            recorder.note_read(self, name)
        return get(self, name)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        recorder = getattr(active, "recorder", None)
        if recorder is not None:
            recorder.note_write(self, name, value)
        put(self, name, value)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        recorder = getattr(active, "recorder", None)
        if recorder is not None:
            recorder.note_made(self)
        make(self, *args, **kwargs)

    found: dict[str, Callable[..., Any]] = {
        "__getattribute__": __getattribute__,
        "__setattr__": __setattr__,
    }
    return found | ({"__init__": __init__} if cls is nn.Module else {})


def release(cls: type) -> None:
    """Give a class its own methods back, if this was the last recorder that needs them."""
    with _lock:
        patched[cls] -= 1
        if patched[cls]:
            return
        del patched[cls]
        for name, value in saved_methods.pop(cls):
            set_in_class(cls, name, value)
