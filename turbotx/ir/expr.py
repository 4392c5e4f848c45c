"""Symbolic sizes: extents, strides and byte counts as expressions in the captured dims.

In: sympy expressions over symbols such as `batch` and `seq`, all integers >= 1 (a call with a size
of 0 has its own capture, in which that 0 is a number). Out: proofs (`is_nonnegative`, `divide`),
source text (`to_c`, `to_python`) and compiled evaluators, for example::

    divide(384*seq + 32, 32)  ->  12*seq + 1
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import sympy
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from turbotx.errors import VerifyError
from turbotx.ir.size_functions import FUNCTIONS, IN_KERNELS, RELATIONS
from turbotx.ir.sizes import Evaluate, Sizes

Expr: TypeAlias = sympy.Expr

ZERO = sympy.Integer(0)
ONE = sympy.Integer(1)

_named: dict[str, tuple[sympy.Symbol, Expr]] = {}
"""By name: a symbol that stands for a part which is not integer arithmetic, such as round(seq *
0.3), and that part."""


def dim(name: str) -> sympy.Symbol:
    """Return the size symbol called `name` (equal names are equal symbols)."""
    if name in _named:
        return _named[name][0]
    return sympy.Symbol(name, integer=True, positive=True)


@lru_cache(maxsize=65536)
def name_functions(value: Expr) -> Expr:
    """Return an integer expression with a symbol for every part that kernels cannot compute.

    Such a part then acts as a size of its own, which no pass takes apart (rounded values must not
    be expanded). Its name is derived from its text, and `spell_out` substitutes it back.
    """
    kind = type(value).__name__
    if (kind in FUNCTIONS and kind not in IN_KERNELS) or value.is_Piecewise:
        return _name(value)
    if not value.args:
        return value
    args = [name_functions(a) if isinstance(a, sympy.Expr) else a for a in value.args]
    return value if args == list(value.args) else value.func(*args)


def _name(value: Expr) -> sympy.Symbol:
    text = to_python(value)
    dims = "_".join(sorted(s.name for s in value.free_symbols))
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    name = f"{type(value).__name__.removesuffix('ToInt').lower()}_{dims}_{mark}"
    if name not in _named:
        sign = {"nonnegative": True} if _keeps_sign(value) else {}
        _named[name] = (sympy.Symbol(name, integer=True, **sign), value)
    return _named[name][0]


def _keeps_sign(value: Expr) -> bool:
    """Return whether a value is >= 0 because all its parts are."""
    if value.is_Symbol or value.is_number:
        return bool(value.is_nonnegative)
    row = FUNCTIONS.get(type(value).__name__)
    kept = value.is_Add or value.is_Mul or value.is_Pow or (row is not None and row.keeps_sign)
    return kept and all(_keeps_sign(a) for a in value.args)


def spell_out(value: Any) -> Any:
    """Return an expression or relation over the captured dims only."""
    found = {s: _named[s.name][1] for s in value.free_symbols if s.name in _named}
    return value.xreplace(found) if found else value


def expr(value: Any) -> Expr:
    """Convert a number, a symbolic number or a sympy expression to a sympy expression."""
    if isinstance(value, sympy.Basic):
        return value
    if isinstance(value, (bool, int, float)):
        return sympy.sympify(value)
    return value.node.expr


def product(sizes: Sequence[Expr]) -> Expr:
    """Return the product of `sizes`; 1 if empty."""
    return _product(tuple(sizes))


@lru_cache(maxsize=65536)
def _product(sizes: tuple[Expr, ...]) -> Expr:
    return sympy.expand(sympy.Mul(*sizes)) if sizes else ONE


@lru_cache(maxsize=65536)
def is_nonnegative(value: Expr) -> bool:
    """Return whether `value` is provably >= 0 when every symbol is an integer >= 1.

    Substitutes each symbol by one plus a nonnegative unknown; nonnegative coefficients then prove
    it. False means "not proved", not "negative".
    """
    if value.is_Integer:
        return bool(value >= 0)
    if value.has(FloorDiv, Mod, PythonMod):
        return bool(value.is_nonnegative)
    if any(s.name in _named and not s.is_nonnegative for s in value.free_symbols):
        return False
    larger = {s: s + 1 for s in value.free_symbols if s.name not in _named}
    shifted = sympy.expand(value.xreplace(larger))
    return all(not term.could_extract_minus_sign() for term in sympy.Add.make_args(shifted))


@lru_cache(maxsize=65536)
def divide(value: Expr, by: Expr) -> Expr | None:
    """Return value / by if `by` divides `value` exactly for all sizes, otherwise None."""
    if by == 1:
        return value
    if value == 0:
        return ZERO
    # A rounded part is an integer like any other: n // 2 divides 4 * (n // 2).
    kinds = (FloorDiv, Mod, PythonMod)
    rounded = value.atoms(*kinds) | by.atoms(*kinds)
    names = {whole: sympy.Dummy(integer=True) for whole in rounded}
    top, bottom = sympy.expand(value.xreplace(names)), by.xreplace(names)
    if not bottom.has(sympy.Add):
        quotient = sympy.expand(top / bottom)
    elif top.is_Add or not bottom.is_Add:
        quotient = sympy.expand(sympy.cancel(top / bottom))
    else:  # a sum divides no product of sizes
        return None
    for term in sympy.Add.make_args(quotient):
        coefficient, rest = term.as_coeff_Mul()
        if not coefficient.is_Integer or sympy.denom(rest) != 1:
            return None
    return quotient.xreplace({name: whole for whole, name in names.items()})


@lru_cache(maxsize=65536)
def cancel_rounding(value: Expr) -> Expr:
    """Replace n // (n // c), a division into blocks of c, by c where c divides n."""
    found = {}
    for whole in value.atoms(FloorDiv):
        n, count = whole.args
        if isinstance(count, FloorDiv) and count.args[0] == n and _is_multiple(n, count.args[1]):
            found[whole] = count.args[1]
    return value.xreplace(found) if found else value


def _is_multiple(n: Expr, of: Expr) -> bool:
    """Return whether n is a multiple of a number: by its factors, or because it is padded to
    one."""
    if not of.is_Integer or divide(n, of) is not None:
        return bool(of.is_Integer)
    return any(
        rest.args[1] == of and (n - rest + rest.args[0]).expand() == 0
        for rest in n.atoms(PythonMod, Mod)
    )


class _SourcePrinter(StrPrinter):
    """Prints a size for Python, C or Triton, which agree on + - * and differ on division."""

    printmethod = "_turbotx_source"  # otherwise torch's FloorDiv prints itself as //
    largest, least, language = "max", "min", "kernels"

    def __init__(self, floor_div: str) -> None:
        super().__init__()
        self._floor_div = floor_div
        self._rounds_down = floor_div == "//"

    def _print_FloorDiv(self, node: Any) -> str:
        top, bottom = (self.parenthesize(a, PRECEDENCE["Atom"], strict=True) for a in node.args)
        if self._floor_div == "/" and _may_be_negative(node.args[0]):
            top = f"({top} - ({top} % {bottom} + {bottom}) % {bottom})"
        return f"({top} {self._floor_div} {bottom})"

    def _print_CleanDiv(self, node: Any) -> str:
        return self._print_FloorDiv(node)

    def _print_Mod(self, node: Any) -> str:
        top, bottom = (self.parenthesize(a, PRECEDENCE["Atom"], strict=True) for a in node.args)
        return f"({top} % {bottom})"

    def _print_PythonMod(self, node: Any) -> str:
        return self._print_Mod(node) if self._rounds_down else self._rest_of_negative(node)

    def _rest_of_negative(self, node: Any) -> str:
        """In C and Triton the remainder has the sign of the dividend, in Python of the divisor."""
        rest = self._print_Mod(node)
        if is_nonnegative(node.args[0]):
            return rest
        bottom = self.parenthesize(node.args[1], PRECEDENCE["Atom"], strict=True)
        return f"(({rest} + {bottom}) % {bottom})"

    def _print_Pow(self, node: Any, rational: bool = False) -> str:
        base, exponent = node.as_base_exp()
        if not (exponent.is_Integer and exponent > 0):
            return self._call("FloatPow", (base, exponent), node)
        return " * ".join([self.parenthesize(base, PRECEDENCE["Mul"])] * int(exponent))

    def _print_Function(self, node: Any) -> str:
        return self._call(type(node).__name__, node.args, node)

    def _call(self, function: str, args: Sequence[Any], node: Any) -> str:
        """Return a call as the table spells it; kernels have none, see `name_functions`."""
        template = self._template(function)
        if not template:
            raise VerifyError(f"{node} has no spelling in {self.language}, see size_functions.py")
        texts = [self.parenthesize(a, PRECEDENCE["Atom"], strict=True) for a in args]
        return template.format(*texts)

    def _template(self, function: str) -> str:
        return ""

    def _print_Mul(self, node: Any) -> str:
        numbers, rest = node.as_coeff_mul()
        factors = [self.parenthesize(f, PRECEDENCE["Mul"]) for f in sorted(rest, key=str)]
        if numbers == -1:
            return "-" + " * ".join(factors)
        return " * ".join(factors + ([self._print(numbers)] if numbers != 1 else []))

    def _print_Max(self, node: Any) -> str:
        return self._fold(self.largest, node)

    def _print_Min(self, node: Any) -> str:
        return self._fold(self.least, node)

    def _fold(self, function: str, node: Any) -> str:
        return functools.reduce(
            lambda a, b: f"{function}({a}, {b})", [self._print(a) for a in node.args]
        )


def _may_be_negative(value: Expr) -> bool:
    """Return whether a size (not a position) may be negative because of a subtraction: (-seq) //
    2."""
    return all(s.name[0] not in "@%" for s in value.free_symbols) and not is_nonnegative(value)


class _HostPrinter(_SourcePrinter):
    """Prints any size, for code that evaluates it once per shape rather than in a kernel."""

    relation = 1  # this language's column in the table
    words = ("True", "False", " and ", " or ", "not ")
    choice = "({yes} if {condition} else {no})"
    infinity, not_a_number = "inf", "nan"

    def _print_Infinity(self, node: Any) -> str:
        return self.infinity

    def _print_NegativeInfinity(self, node: Any) -> str:
        return f"(-{self.infinity})"

    def _print_NaN(self, node: Any) -> str:
        return self.not_a_number

    def _print_Float(self, node: Any) -> str:
        return repr(float(node))

    def _print_Rational(self, node: Any) -> str:
        return f"({node.p} / {node.q})"

    def _print_Relational(self, node: Any) -> str:
        left, right = (self.parenthesize(a, PRECEDENCE["Atom"], strict=True) for a in node.args)
        return f"({left} {RELATIONS[type(node).__name__][self.relation]} {right})"

    def _print_BooleanTrue(self, node: Any) -> str:
        return self.words[0]

    def _print_BooleanFalse(self, node: Any) -> str:
        return self.words[1]

    def _print_And(self, node: Any, order: Any = None) -> str:
        return f"({self.words[2].join(self._print(a) for a in node.args)})"

    def _print_Or(self, node: Any) -> str:
        return f"({self.words[3].join(self._print(a) for a in node.args)})"

    def _print_Not(self, node: Any) -> str:
        return f"({self.words[4]}{self._print(node.args[0])})"

    def _print_Piecewise(self, node: Any) -> str:
        *chosen, (last, _) = node.args
        text = self._print(last)
        for value, condition in reversed(chosen):
            yes, when = self._print(value), self._print(condition)
            text = self.choice.format(yes=yes, condition=when, no=text)
        return text

    # StrPrinter has its own forms of these.
    _print_Abs = _print_Identity = _SourcePrinter._print_Function


class _PythonPrinter(_HostPrinter):
    language = "Python"

    def _template(self, function: str) -> str:
        return FUNCTIONS[function].python if function in FUNCTIONS else ""


def to_python(value: Any) -> str:
    """Return a size, a float computed from sizes, or a relation between them, as Python source."""
    return _PythonPrinter("//").doprint(spell_out(value))


class _CPrinter(_SourcePrinter):
    """C++ deduces no common type of an int64_t and a literal, so the type is explicit."""

    largest, least = "ttx::maximum<int64_t>", "ttx::minimum<int64_t>"


def to_c(value: Expr) -> str:
    """Return `value` as C++ source over int64_t names. There / truncates: dividends are nonnegative
    positions or sizes, or divide evenly."""
    return _CPrinter("/").doprint(value)


class _JavaScriptPrinter(_HostPrinter):
    """JavaScript numbers are doubles: exact below 2**53; division must be floored."""

    largest, least = "Math.max", "Math.min"
    relation, language = 2, "JavaScript"
    words = ("true", "false", " && ", " || ", "!")
    choice = "({condition} ? {yes} : {no})"
    infinity, not_a_number = "Infinity", "NaN"

    def _template(self, function: str) -> str:
        return FUNCTIONS[function].javascript if function in FUNCTIONS else ""

    def _print_FloorDiv(self, node: Any) -> str:
        top, bottom = (self.parenthesize(a, PRECEDENCE["Atom"], strict=True) for a in node.args)
        return f"Math.floor({top} / {bottom})"


def to_javascript(value: Expr) -> str:
    """Return `value` as JavaScript source (sizes are nonnegative, so % agrees)."""
    return _JavaScriptPrinter("/").doprint(spell_out(value))


def compile_evaluator(values: Iterable[Any], dims: Sequence[str]) -> Evaluate:
    """Return a function that maps the dims, in order, to a tuple of all values.

    Compiled from one Python expression, see `Sizes`; calling it needs no sympy.
    """
    return sizes_of(values).compile(dims)


def sizes_of(values: Iterable[Any]) -> Sizes:
    """Return expressions as plain data; raise VerifyError if one cannot be printed."""
    return Sizes(tuple(map(to_python, values)))


def evaluate(value: Expr, dims: Mapping[str, int]) -> int:
    """Return `value` at concrete dims, evaluated by Python; slow, for reports and tests."""
    if value.is_Integer:
        return int(value)
    names, compute = _evaluator(spell_out(value))
    return int(compute(*(dims[n] for n in names))[0])


@lru_cache(maxsize=4096)
def _evaluator(value: Expr) -> tuple[list[str], Evaluate]:
    names = sorted(s.name for s in value.free_symbols)
    return names, compile_evaluator([value], names)
