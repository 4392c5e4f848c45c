"""Identity: while tracing, a module's stand-in compares and hashes equal to the user's module.

In: a function that returns the user's module for a stand-in met by the traced code. Out: dicts and
sets keyed by modules work as in eager mode::

    with equal_to(recorder.find_known):
        SCALES.get(self)        # finds the user's module, though `self` is a copy

`is` and `id` still distinguish them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import nn


@contextmanager
def equal_to(find_own: Callable[[Any], Any]) -> Iterator[None]:
    """Context manager: compare modules in this thread by the result of `find_own`, unless their
    class defines its own comparison. `find_own` must not hash a module: PyTorch's tables of
    stand-ins are keyed by modules."""
    owner, cls = threading.get_ident(), nn.Module
    equal, own_hash = cls.__eq__, cls.__hash__

    def find(module: Any) -> Any:
        return find_own(module) if threading.get_ident() == owner else module

    def __eq__(self: Any, other: object) -> Any:
        a, b = find(self), find(other) if isinstance(other, nn.Module) else other
        return a is b or equal(a, b)

    def __hash__(self: Any) -> int:
        return own_hash(find(self))

    with mock.patch.multiple(cls, __eq__=__eq__, __hash__=__hash__):
        yield
