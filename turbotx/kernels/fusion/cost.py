"""Cost: decides whether a kernel loads a value that an earlier kernel computed or recomputes it.

In: the bytes that a region's kernels move in either case, as functions of the shape. Out: a
`Choice`, with a text for the report, for example::

    mul is stored, not computed again: 5*4096*batch rather than 6*4096*batch bytes

The kernels are memory-bound, so only bytes count and arithmetic is free. One program serves every
shape; if the decision depends on the shape, a medium one is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from turbotx import ir
from turbotx.ir.expr import ZERO, Expr, evaluate, spell_out
from turbotx.ir.printer import show_expr
from turbotx.kernels.fusion.traffic import kernel_traffic

# The value of every run-time size when two sums of bytes are compared.
MIDDLING = 64


@dataclass(frozen=True)
class Choice:
    """The bytes that a region moves if `value` is stored by one kernel for another, and if it is
    recomputed."""

    value: str
    stored_nbytes: Expr
    recomputed_nbytes: Expr

    @property
    def is_stored(self) -> bool:
        """Whether storing moves fewer bytes; a tie recomputes."""
        return compare_nbytes(self.stored_nbytes, self.recomputed_nbytes) < 0

    def __str__(self) -> str:
        ways = ["is stored, not computed again", "is computed again, not stored"]
        figures = [show_expr(self.stored_nbytes), show_expr(self.recomputed_nbytes)]
        if not self.is_stored:
            ways, figures = ways[::-1], figures[::-1]
        return f"{self.value} {ways[0]}: {figures[0]} rather than {figures[1]} bytes"


def moved_nbytes(kernels: Sequence[ir.Kernel]) -> Expr:
    """Return the bytes that kernels read and write, in sequence."""
    found = [kernel_traffic(kernel) for kernel in kernels]
    return sympy.expand(sum((t.read_nbytes + t.written_nbytes for t in found), ZERO))


def compare_nbytes(a: Expr, b: Expr) -> int:
    """Return a number below, equal to or above zero if `a` is less than, equal to or more than
    `b`."""
    difference = spell_out(sympy.expand(a - b))
    for size in (MIDDLING, 16 * MIDDLING):
        try:
            return evaluate(difference, {s.name: size for s in difference.free_symbols})
        except ArithmeticError:  # a size that the model does not accept: division by zero
            continue
    return 0
