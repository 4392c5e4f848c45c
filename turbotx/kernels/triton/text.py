"""Pieces of Triton source: expressions with their precedence, sizes, constants, long lines.

In: what the printers want to say. Out: text as a careful engineer would lay it out, for example::

    ValueText("a + b", level=1).inside(2)  ->  "(a + b)"
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from sympy.printing.precedence import PRECEDENCE

from turbotx.ir.expr import Expr, _SourcePrinter

WIDTH = 100
ATOM = 3
# How tightly an operator's own text binds, and what its operands must at least do.
LEVELS = {
    "add": (1, (1, 2)), "sub": (1, (1, 2)), "mul": (2, (2, 3)), "div": (2, (2, 3)),
}  # fmt: skip


@dataclass(frozen=True)
class ValueText:
    """Source of a value. level: how tightly it binds: a name 3, a product 2, a sum 1, others 0."""

    text: str
    level: int = ATOM

    def inside(self, level: int = ATOM) -> str:
        """Return the text as part of an expression that binds as tightly as `level`."""
        return self.text if self.level >= level else f"({self.text})"


class _TritonPrinter(_SourcePrinter):
    """Sizes as Triton source: positions are never negative, so // and % round down there too."""

    largest, least = "tl.maximum", "tl.minimum"

    def _print_FloorDiv(self, node: Any) -> str:
        return self._divide(node, "//")

    def _print_Mod(self, node: Any) -> str:
        return self._divide(node, "%")

    def _print_PythonMod(self, node: Any) -> str:
        return self._rest_of_negative(node)

    def _divide(self, node: Any, sign: str) -> str:
        top, bottom = (self.parenthesize(a, PRECEDENCE["Atom"], strict=True) for a in node.args)
        return f"({top} {sign} {bottom})"

    def _print_Mul(self, node: Any) -> str:
        """Print a product with loop positions before their strides."""
        number, rest = node.as_coeff_mul()
        factors = sorted((self.parenthesize(f, PRECEDENCE["Mul"]) for f in rest), key=_is_position)
        sign = "-" if number < 0 else ""
        return sign + " * ".join(factors + [str(abs(number))] * (abs(number) != 1))

    def _print_Add(self, node: Any, order: Any = None) -> str:
        """Rows before columns before constants, as an address is usually written."""

        def rank(term: Expr) -> tuple[int, int, str]:
            text = self._print(term)
            kind = 3 if term.is_number else 1 if "row" in text else 2 if "col" in text else 0
            return kind, -len(text), text

        result = ""
        for term in sorted(node.args, key=rank):
            text = self._print(term)
            if not result:
                result = text
            elif text.startswith("-"):
                result += f" - {text[1:]}"
            else:
                result += f" + {text}"
        return result


def _is_position(factor: str) -> tuple[int, str]:
    return 0 if factor.startswith(("row", "col", "(row", "(col")) else 1, factor


def size_text(value: Expr) -> str:
    """Return a size or an offset as Triton source."""
    return _TritonPrinter("//").doprint(value)


def literal(value: bool | int | float, dtype: torch.dtype) -> str:
    """Return a constant as source; it takes the dtype of what it meets."""
    if dtype is torch.bool:
        return str(bool(value))
    if not dtype.is_floating_point:
        return str(int(value))
    if math.isnan(value) or math.isinf(value):
        return f'float("{float(value)!r}")'
    return repr(float(value))


def wrap(line: str) -> list[str]:
    """Break a line that is too long at the commas of its longest outermost call."""
    begin, end = _longest_group(line)
    if len(line) <= WIDTH or end - begin < WIDTH // 3:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()))
    parts = split_arguments(line[begin + 1 : end])
    # A comma behind the one part of plain parentheses would make a tuple of it.
    called = begin > 0 and (line[begin - 1].isalnum() or line[begin - 1] in "_]")
    comma = "," if called or len(parts) > 1 else ""
    pieces = [f"{indent}    {p}{comma}" for p in parts]
    inner = [part for piece in pieces for part in wrap(piece)]
    return [line[: begin + 1], *inner, indent + line[end:]]


def _longest_group(line: str) -> tuple[int, int]:
    """Return where the longest pair of outermost parentheses opens and closes."""
    best, depth, opened = (0, 0), 0, 0
    for k, letter in enumerate(line):
        if letter == "(":
            opened = opened if depth else k
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0 and k - opened > best[1] - best[0]:
                best = (opened, k)
    return best


def split_arguments(text: str) -> list[str]:
    """Split at commas that stand in no inner parentheses, nor in a string."""
    pieces, depth, begin, quoted = [], 0, 0, False
    for k, letter in enumerate(text):
        quoted ^= letter == '"'
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0 and not quoted:
            pieces.append(text[begin:k].strip())
            begin = k + 1
    pieces.append(text[begin:].strip())
    return [p for p in pieces if p]
