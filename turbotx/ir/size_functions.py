"""Functions of sizes: everything that PyTorch's symbolic shapes can apply to sizes, one row each.

In: the name of a sympy function, as in torch.utils._sympy.functions and sympy. Out: the Python
function, and its spelling in Python and in JavaScript::

    FUNCTIONS["FloorToInt"].python.format("0.5 * seq")  ->  "floor(0.5 * seq)"

Kernels get the results of these functions as arguments, see `expr.name_functions`, so that a size
computed through a float has Python's value on every device.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MAX_EXPONENT = 4096
"""A saved file could contain 9 ** 9 ** 9; no tensor size needs a larger exponent than this."""


@dataclass(frozen=True)
class SizeFunction:
    """One function of sizes.

    call: takes numbers or torch's symbolic numbers.
    python, javascript: templates over the arguments, each an atom.
    keeps_sign: whether arguments >= 0 give a result >= 0.
    """

    call: Callable[..., Any]
    python: str = ""
    javascript: str = ""
    keeps_sign: bool = False


def power(base: Any, exponent: Any) -> Any:
    """Return base ** exponent; raise OverflowError for an exponent too large for any size."""
    if isinstance(exponent, int) and exponent > MAX_EXPONENT:
        raise OverflowError(f"{base} ** {exponent} is not a size")
    return base**exponent


def bounded(size: int, least: int, *most: int) -> int:
    """Return a size limited to at least `least` and at most each of `most`. Numbers that record
    their computation (`saved.variants`) have a method of this name, which records this step too."""
    for x in (size, *most):
        if hasattr(x, "bounded"):
            found: int = x.bounded(size, least, *most)
            return found
    return max(least, min(size, *most))


def _choose(condition: Any, yes: Any, no: Any) -> Any:
    return torch.sym_ite(condition, yes, no)


def _modular(x: Any, by: Any, modulus: Any) -> Any:
    return x // by % modulus


def _trunc(x: Any) -> Any:
    return torch.sym_float(math.trunc(x))


def _same(x: Any) -> Any:
    return x


def _symbolic(name: str) -> Callable[[Any], Any]:
    """Return PyTorch's traceable function of one float, which also accepts plain numbers."""
    return getattr(torch, f"_sym_{name}")


_TO_EVEN = (
    "(x => {{ const r = Math.round(x); return Math.abs(x % 1) === 0.5 && r % 2 ? r - 1 : r; }})"
)

FUNCTIONS: dict[str, SizeFunction] = {
    # Integers; the first of them are printed by `expr`, since kernels compute them too.
    "FloorDiv": SizeFunction(operator.floordiv, keeps_sign=True),
    "CleanDiv": SizeFunction(operator.floordiv, keeps_sign=True),
    "Mod": SizeFunction(operator.mod, keeps_sign=True),
    "PythonMod": SizeFunction(operator.mod, keeps_sign=True),
    "Max": SizeFunction(torch.sym_max, keeps_sign=True),
    "Min": SizeFunction(torch.sym_min, keeps_sign=True),
    "ModularIndexing": SizeFunction(
        _modular, "({0} // {1} % {2})", "(Math.floor({0} / {1}) % {2})", True
    ),
    "PowByNatural": SizeFunction(operator.pow, "power({0}, {1})", "Math.pow({0}, {1})", True),
    "Abs": SizeFunction(abs, "abs({0})", "Math.abs({0})", True),
    "BitwiseFn_bitwise_and": SizeFunction(operator.and_, "({0} & {1})", "({0} & {1})", True),
    "BitwiseFn_bitwise_or": SizeFunction(operator.or_, "({0} | {1})", "({0} | {1})", True),
    "BitwiseFn_bitwise_xor": SizeFunction(operator.xor, "({0} ^ {1})", "({0} ^ {1})", True),
    # From floats to integers.
    "FloorToInt": SizeFunction(math.floor, "floor({0})", "Math.floor({0})", True),
    "CeilToInt": SizeFunction(math.ceil, "ceil({0})", "Math.ceil({0})", True),
    "TruncToInt": SizeFunction(math.trunc, "trunc({0})", "Math.trunc({0})", True),
    "RoundToInt": SizeFunction(round, "round({0})", _TO_EVEN + "({0})", True),
    "floor": SizeFunction(math.floor, "floor({0})", "Math.floor({0})", True),
    "ceiling": SizeFunction(math.ceil, "ceil({0})", "Math.ceil({0})", True),
    # Floats.
    "ToFloat": SizeFunction(torch.sym_float, "float({0})", "({0})", True),
    "TruncToFloat": SizeFunction(_trunc, "float(trunc({0}))", "Math.trunc({0})", True),
    "RoundDecimal": SizeFunction(round, "round({0}, {1})", "Number(({0}).toFixed({1}))", True),
    "IntTrueDiv": SizeFunction(operator.truediv, "({0} / {1})", "({0} / {1})", True),
    "FloatTrueDiv": SizeFunction(operator.truediv, "({0} / {1})", "({0} / {1})", True),
    "FloatPow": SizeFunction(operator.pow, "power({0}, {1})", "Math.pow({0}, {1})", True),
    "OpaqueUnaryFn_sqrt": SizeFunction(_symbolic("sqrt"), "sqrt({0})", "Math.sqrt({0})", True),
    # Conditionals, and markers.
    "Where": SizeFunction(_choose, "({1} if {0} else {2})", "({0} ? {1} : {2})"),
    "Identity": SizeFunction(_same, "({0})", "({0})", True),
}
for _name in ("exp", "log", "asinh"):  # in torch's table, though no SymFloat produces them yet
    FUNCTIONS[f"OpaqueUnaryFn_{_name}"] = SizeFunction(
        getattr(math, _name), f"{_name}({{0}})", f"Math.{_name}({{0}})"
    )
for _name in ("cos", "sin", "tan", "cosh", "sinh", "tanh", "acos", "asin", "atan", "log2"):
    FUNCTIONS[f"OpaqueUnaryFn_{_name}"] = SizeFunction(
        _symbolic(_name), f"{_name}({{0}})", f"Math.{_name}({{0}})"
    )

RELATIONS: dict[str, tuple[Callable[[Any, Any], Any], str, str]] = {
    "Equality": (operator.eq, "==", "==="), "Unequality": (operator.ne, "!=", "!=="),
    "StrictLessThan": (operator.lt, "<", "<"), "LessThan": (operator.le, "<=", "<="),
    "StrictGreaterThan": (operator.gt, ">", ">"), "GreaterThan": (operator.ge, ">=", ">="),
}  # fmt: skip
"""By sympy's name: the function, Python's operator, JavaScript's operator."""

PYTHON_NAMES: dict[str, Any] = {
    "max": max, "min": min, "abs": abs, "round": round, "float": float, "power": power,
    "floor": math.floor, "ceil": math.ceil, "trunc": math.trunc, "sqrt": math.sqrt,
    "inf": math.inf, "nan": math.nan, "True": True, "False": False,
    **{n: getattr(math, n) for n in ("cos", "sin", "tan", "cosh", "sinh", "tanh", "acos", "asin",
                                     "atan", "log2", "exp", "log", "asinh")},
}  # fmt: skip
"""The names used by the Python spellings."""

IN_KERNELS = frozenset(("FloorDiv", "CleanDiv", "Mod", "PythonMod", "Max", "Min"))
"""Functions that kernels compute themselves, of positions as well as sizes."""
