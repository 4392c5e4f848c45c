"""Size operators: what Python's own operators give for sizes that a trace has as expressions.

In: a trace. Out: the same trace, in which floats are computed step by step as Python does, and, if
need be, comparisons that the model writes are answered at once: some ops take a bool only::

    with float_steps():         n * 0.1 * 3  ->  (0.1 * n) * 3, not 0.30000000000000004 * n
    with relations_answered():  is_causal=n > 1  ->  True, with the guard n > 1
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import sympy
import torch
from torch.utils._sympy.functions import Identity

from turbotx.capture.module_state.values import is_library

_COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
_SUMS = ("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__")
"""Of these sympy would merge the numbers of one with those of the next; no other operator's."""


def float_steps() -> ExitStack:
    """Meanwhile, in this thread, a sum or product of floats is one operand of what follows."""
    return _replaced(_SUMS, _as_step)


def wants_bool(error: BaseException | None) -> bool:
    """Tell whether a trace ended because an op takes a bool and was given a comparison of sizes."""
    return isinstance(error, TypeError) and "SymBool" in str(error)


def relations_answered() -> ExitStack:
    """Meanwhile, in this thread, comparisons in the model's code are True or False at once."""
    return _replaced(_COMPARISONS, _as_bool)


def _as_step(found: Any, asker: str | None) -> Any:
    made = found.node._expr if isinstance(found, torch.SymFloat) else None
    if isinstance(made, (sympy.Add, sympy.Mul)):
        found.node._expr = Identity(made)
    return found


def _as_bool(found: Any, asker: str | None) -> Any:
    return bool(found) if isinstance(found, torch.SymBool) and not is_library(asker) else found


def _replaced(names: Sequence[str], change: Callable[[Any, str | None], Any]) -> ExitStack:
    """Have what operators of sizes give go through `change`, with the module whose code asks."""
    thread = threading.get_ident()

    def changed(operator: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(operator)
        def operate(self: Any, other: Any) -> Any:
            found = operator(self, other)
            if threading.get_ident() != thread:
                return found
            return change(found, sys._getframe(1).f_globals.get("__name__"))

        return operate

    stack = ExitStack()
    for cls in (torch.SymInt, torch.SymFloat):
        for name in names:
            stack.enter_context(patch.object(cls, name, changed(getattr(cls, name))))
    return stack
