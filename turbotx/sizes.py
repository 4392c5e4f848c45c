"""Symbolic sizes: extents, strides and byte counts as expressions in the captured dims.

In: sympy expressions over symbols such as `batch` and `seq`, all of them integers of at least
one (a call with a size of 0 has a capture of its own, in which that 0 is a number). Out: proofs
(`is_nonnegative`, `divide`), source text (`to_c`, `to_python`) and compiled evaluators, such as::

    divide(384*seq + 32, 32)  ->  12*seq + 1
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import sympy
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

Expr: TypeAlias = sympy.Expr

ZERO = sympy.Integer(0)
ONE = sympy.Integer(1)


def dim(name: str) -> sympy.Symbol:
    """Return the size symbol called `name` (equal names are equal symbols)."""
    return sympy.Symbol(name, integer=True, positive=True)


def expr(value: Any) -> Expr:
    """Return an int, SymInt or sympy expression as a sympy expression."""
    if isinstance(value, sympy.Expr):
        return value
    if isinstance(value, int):
        return sympy.Integer(value)
    return value.node.expr


def product(sizes: Sequence[Expr]) -> Expr:
    """Return the product of `sizes` (one for none)."""
    return sympy.expand(sympy.Mul(*sizes)) if sizes else ONE


@lru_cache(maxsize=65536)
def is_nonnegative(value: Expr) -> bool:
    """Tell whether `value` is provably >= 0 when every symbol is an integer >= 1.

    Substitutes each symbol by one plus a non-negative unknown: then non-negative coefficients
    prove it. False means "not proved", not "negative".
    """
    if value.is_Integer:
        return bool(value >= 0)
    if value.has(FloorDiv, Mod, PythonMod):
        return bool(value.is_nonnegative)
    shifted = sympy.expand(value.xreplace({s: s + 1 for s in value.free_symbols}))
    return all(not term.could_extract_minus_sign() for term in sympy.Add.make_args(shifted))


@lru_cache(maxsize=65536)
def divide(value: Expr, by: Expr) -> Expr | None:
    """Return value / by when `by` divides `value` exactly for all sizes, otherwise None."""
    if by == 1:
        return value
    if value == 0:
        return ZERO
    # What is rounded is a whole number like any other: n // 2 divides 4 * (n // 2).
    kinds = (FloorDiv, Mod, PythonMod)
    rounded = value.atoms(*kinds) | by.atoms(*kinds)
    names = {whole: sympy.Dummy(integer=True) for whole in rounded}
    quotient = sympy.expand(sympy.cancel(value.xreplace(names) / by.xreplace(names)))
    for term in sympy.Add.make_args(quotient):
        coefficient, rest = term.as_coeff_Mul()
        if not coefficient.is_Integer or sympy.denom(rest) != 1:
            return None
    return quotient.xreplace({name: whole for whole, name in names.items()})


class _SourcePrinter(StrPrinter):
    """Prints a size for Python, C and Triton, which agree on + - * and differ on division."""

    printmethod = "_turbotx_source"  # torch's FloorDiv would print itself as // otherwise
    largest, least = "max", "min"

    def __init__(self, floor_div: str) -> None:
        super().__init__()
        self._floor_div = floor_div
        self._rounds_down = floor_div == "//"

    def _print_FloorDiv(self, node: Any) -> str:
        top, bottom = (self.parenthesize(a, PRECEDENCE["Atom"], strict=True) for a in node.args)
        if self._floor_div == "/" and _may_be_negative(node.args[0]):
            top = f"({top} - ({top} % {bottom} + {bottom}) % {bottom})"
        return f"({top} {self._floor_div} {bottom})"

    def _print_Mod(self, node: Any) -> str:
        top, bottom = (self.parenthesize(a, PRECEDENCE["Atom"], strict=True) for a in node.args)
        return f"({top} % {bottom})"

    def _print_PythonMod(self, node: Any) -> str:
        return self._print_Mod(node) if self._rounds_down else self._rest_of_negative(node)

    def _rest_of_negative(self, node: Any) -> str:
        """C and Triton give the rest of a negative number its sign, Python its divisor's."""
        rest = self._print_Mod(node)
        if is_nonnegative(node.args[0]):
            return rest
        bottom = self.parenthesize(node.args[1], PRECEDENCE["Atom"], strict=True)
        return f"(({rest} + {bottom}) % {bottom})"

    def _print_Pow(self, node: Any, rational: bool = False) -> str:
        base, exponent = node.as_base_exp()
        return " * ".join([self.parenthesize(base, PRECEDENCE["Mul"])] * int(exponent))

    def _print_Mul(self, node: Any) -> str:
        numbers, rest = node.as_coeff_mul()
        factors = [self.parenthesize(f, PRECEDENCE["Mul"]) for f in sorted(rest, key=str)]
        if numbers == -1:
            return "-" + " * ".join(factors)
        return " * ".join(factors + ([str(numbers)] if numbers != 1 else []))

    def _print_Max(self, node: Any) -> str:
        return self._fold(self.largest, node)

    def _print_Min(self, node: Any) -> str:
        return self._fold(self.least, node)

    def _fold(self, function: str, node: Any) -> str:
        return functools.reduce(
            lambda a, b: f"{function}({a}, {b})", [self._print(a) for a in node.args]
        )


def _may_be_negative(value: Expr) -> bool:
    """Tell whether a size, not a position, was made of others by taking away: (-seq) // 2."""
    return all(s.name[0] not in "@%" for s in value.free_symbols) and not is_nonnegative(value)


def to_python(value: Expr) -> str:
    """Return `value` as Python source."""
    return _SourcePrinter("//").doprint(value)


class _CPrinter(_SourcePrinter):
    """C++ deduces no common type of an int64_t and a literal, so it is told which one."""

    largest, least = "std::max<int64_t>", "std::min<int64_t>"


def to_c(value: Expr) -> str:
    """Return `value` as C++ source over int64_t names, where / rounds to zero: what is divided is
    a position or a size, never negative, or made to divide evenly."""
    return _CPrinter("/").doprint(value)


class _JavaScriptPrinter(_SourcePrinter):
    """JavaScript's numbers are doubles: exact below 2**53, and division has to be floored."""

    largest, least = "Math.max", "Math.min"

    def _print_FloorDiv(self, node: Any) -> str:
        top, bottom = (self.parenthesize(a, PRECEDENCE["Atom"], strict=True) for a in node.args)
        return f"Math.floor({top} / {bottom})"


def to_javascript(value: Expr) -> str:
    """Return `value` as JavaScript source (sizes are never negative, so % is the same there)."""
    return _JavaScriptPrinter("/").doprint(value)


def compile_evaluator(
    values: Sequence[Expr], dims: Sequence[str]
) -> Callable[..., tuple[int, ...]]:
    """Return a function of the dims, in order, that returns every value as a tuple of ints.

    One Python expression compiled once: a few tens of nanoseconds a value, no sympy at run time.
    """
    listed = "".join(f"{to_python(v)}, " for v in values)
    source = f"lambda {', '.join(dims)}: ({listed})" if values else f"lambda {', '.join(dims)}: ()"
    return eval(compile(source, "<turbotx sizes>", "eval"), {"max": max, "min": min})


def evaluate(value: Expr, dims: Mapping[str, int]) -> int:
    """Return `value` at concrete dims; slow, for reports and tests."""
    return int(value.xreplace({s: sympy.Integer(dims[s.name]) for s in value.free_symbols}))
