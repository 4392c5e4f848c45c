"""Environment: the environment variables that the code under a trace reads.

In: a model's code, traced in this context. Out: places of the variables that it read by
`os.environ` or `os.getenv`, each checked before every call like an attribute::

    with watch_environment() as asked:
        os.environ.get("FLASH")  ->  asked == {"FLASH": ItemPlace(..., "the environment's FLASH")}
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from turbotx.capture.module_state.places import ItemPlace
from turbotx.capture.module_state.values import caller_outside, is_users

_WAYS = frozenset(("os", "_collections_abc", "collections.abc"))
"""Modules through which code reads the environment."""


@contextmanager
def watch_environment() -> Iterator[dict[str, ItemPlace]]:
    """Context manager: record which environment variables user code in this thread reads."""
    environ: Any = os.environ
    held = getattr(environ, "_data", None)  # private, the same in every CPython from 3.10 on
    asked: dict[str, ItemPlace] = {}
    if not isinstance(held, dict):
        yield asked
        return
    cls, owner = type(environ), threading.get_ident()
    get, each = cls.__getitem__, cls.__iter__

    def asks() -> bool:
        asker = caller_outside(sys._getframe(2), _WAYS)
        return is_users(asker) and threading.get_ident() == owner

    def __getitem__(self: Any, key: str) -> str:
        if self is environ and isinstance(key, str) and key not in asked and asks():
            place = ItemPlace(held, environ.encodekey(key), f"the environment's {key}")
            asked[key] = place
        found: str = get(self, key)
        return found

    def __iter__(self: Any) -> Iterator[str]:
        if self is environ and asks():
            asked[""] = ItemPlace({"": held}, "", "the environment")
        return each(self)

    with mock.patch.multiple(cls, __getitem__=__getitem__, __iter__=__iter__):
        yield asked
