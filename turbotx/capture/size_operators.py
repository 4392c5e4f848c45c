"""Size operators: Python's arithmetic operators on symbolic sizes.

In: a trace. Out: the same trace, in which floats are computed step by step as in Python, a division
by zero raises as in Python (with a guard), a size written into a string is a number (with a guard),
and `isinstance` sees an int. Optionally, the model's comparisons are evaluated at once, since some
ops accept only a bool::

    with python_operators():    n * 0.1 * 3  ->  (0.1 * n) * 3, not 0.30000000000000004 * n
                                10 % (n - 2)  ->  Mod(10, n - 2), with the guard n != 2
                                f"layer_{n}"  ->  "layer_5", with the guard n == 5
    with relations_answered():  is_causal=n > 1  ->  True, with the guard n > 1
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import FrameType
from typing import Any
from unittest.mock import patch

import sympy
import torch
from torch.utils._sympy.functions import Identity

from turbotx.capture.module_state.places import class_dict
from turbotx.capture.module_state.values import is_library, is_library_or_sympy
from turbotx.errors import note_error

_COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
_SUMS = ("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__")
"""The only operators whose constants sympy would merge with those of the next one."""
_DIVISIONS = ("__truediv__", "__floordiv__", "__mod__", "__divmod__")
_NUMBERS: dict[type, type] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
_SYMBOLIC = (torch.SymInt, torch.SymFloat)


def python_operators() -> ExitStack:
    """Context manager: make float sums and products opaque operands of later expressions, refuse
    divisions by zero, and make sizes numbers when they are formatted; in this thread."""
    stack = _replaced(_SUMS, _as_step)
    stack.enter_context(_replaced(_DIVISIONS, before=_refuse_zero))
    reflected = [f"__r{name[2:]}" for name in _DIVISIONS]
    stack.enter_context(_replaced(reflected, before=lambda a, b, asker: _refuse_zero(b, a, asker)))
    stack.enter_context(_replaced(("__pow__",), before=_refuse_power))
    stack.enter_context(_replaced(("__rpow__",), before=lambda a, b, c: _refuse_power(b, a, c)))
    thread = threading.get_ident()
    for cls in (torch.SymInt, torch.SymFloat, torch.SymBool):
        for name in ("__repr__", "__format__"):
            stack.enter_context(patch.object(cls, name, _spelling(getattr(cls, name), thread)))
        stack.enter_context(patch.object(cls, "__hash__", _hashing(cls.__hash__, thread)))
        _set_class(cls, property(_kind(cls, thread)))
        stack.callback(_set_class, cls, None)
    return stack


def _set_class(cls: type, kind: property | None) -> None:
    """Set the property that `isinstance` reads on a class's objects; `setattr` does not accept
    it."""
    held = class_dict(cls)
    held.pop("__class__", None)
    if kind is not None:
        held["__class__"] = kind
    cls.__doc__ = cls.__doc__  # invalidates Python's cache of the class's attributes


def _kind(cls: type, thread: int) -> Callable[[Any], type]:
    """Return a getter of `__class__` that tells the model's code that a size is an int, as in eager
    mode."""

    def kind(self: Any) -> type:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__") == "abc":
            frame = frame.f_back
        asker = None if frame is None else frame.f_globals.get("__name__")
        return (
            cls if is_library_or_sympy(asker) or threading.get_ident() != thread else _NUMBERS[cls]
        )

    return kind


def wants_bool(error: BaseException | None) -> bool:
    """Return whether a trace failed because a comparison of sizes was used where only a bool is
    accepted."""
    text = str(error)
    return isinstance(error, TypeError) and ("SymBool" in text or "BooleanAtom" in text)


def wants_number(error: BaseException | None) -> bool:
    """Return whether a trace failed because a size was passed where only plain numbers are
    accepted."""
    return isinstance(error, TypeError) and ("SymInt" in str(error) or "SymFloat" in str(error))


def relations_answered() -> ExitStack:
    """Context manager: evaluate comparisons in the model's code to bools, in this thread."""
    return _replaced(_COMPARISONS, _as_bool)


def _refuse_zero(dividend: Any, divisor: Any, asker: str | None) -> None:
    """Raise ZeroDivisionError where the model's code divides by zero; a guard where it does not."""
    if not is_library_or_sympy(asker) and isinstance(divisor, _SYMBOLIC) and divisor == 0:
        raise ZeroDivisionError("division by zero")


def _as_step(found: Any, asker: str | None) -> Any:
    made = found.node._expr if isinstance(found, torch.SymFloat) else None
    if isinstance(made, (sympy.Add, sympy.Mul)):
        found.node._expr = Identity(made)
    return found


def _as_bool(found: Any, asker: str | None) -> Any:
    return bool(found) if isinstance(found, torch.SymBool) and not is_library(asker) else found


def _spelling(show: Callable[..., str], thread: int) -> Callable[..., str]:
    @functools.wraps(show)
    def spell(self: Any, *form: str) -> str:
        asker = sys._getframe(1).f_globals.get("__name__")
        if threading.get_ident() != thread or is_library(asker):
            return show(self, *form)
        number = _NUMBERS[type(self)](self)
        return format(number, *form) if form else repr(number)

    return spell


def _hashing(own: Callable[[Any], int], thread: int) -> Callable[[Any], int]:
    """Return a size's `__hash__`, which raises for most, that notes the error if it is the model's
    code that asks, as by `table[n]`: that may catch it, and eager mode has a number."""

    @functools.wraps(own)
    def __hash__(self: Any) -> int:
        try:
            return own(self)
        except Exception as error:
            asker = sys._getframe(1).f_globals.get("__name__")
            if threading.get_ident() == thread and not is_library_or_sympy(asker):
                note_error(error)
            raise

    return __hash__


def _refuse_power(base: Any, exponent: Any, asker: str | None) -> None:
    """Raise ZeroDivisionError where the model's code takes a negative power of zero."""
    numbers = all(isinstance(x, (int, float, *_SYMBOLIC)) for x in (base, exponent))
    if numbers and not is_library_or_sympy(asker) and exponent < 0 and base == 0:
        raise ZeroDivisionError("zero cannot be raised to a negative power")


def _unchanged(found: Any, asker: str | None) -> Any:
    return found


def _replaced(
    names: Sequence[str],
    change: Callable[[Any, str | None], Any] = _unchanged,
    before: Callable[[Any, Any, str | None], None] | None = None,
) -> ExitStack:
    """Pass the operands of size operators to `before`, and their results through `change`, with the
    module of the calling code."""
    thread = threading.get_ident()

    def changed(operator: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(operator)
        def operate(self: Any, other: Any) -> Any:
            if threading.get_ident() != thread:
                return operator(self, other)
            asker = sys._getframe(1).f_globals.get("__name__")
            if before is not None:
                before(self, other, asker)
            return change(operator(self, other), asker)

        return operate

    stack = ExitStack()
    for cls in _SYMBOLIC:
        for name in names:
            if hasattr(cls, name):
                stack.enter_context(patch.object(cls, name, changed(getattr(cls, name))))
    return stack
