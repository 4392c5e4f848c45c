"""Cost: decides whether a kernel loads a value that an earlier one has made or computes it again.

In: the bytes that a region's kernels move either way, as functions of the shape. Out: a `Choice`,
which says it in words for the report, for example::

    mul is stored, not computed again: 5*4096*batch rather than 6*4096*batch bytes

The kernels are bound by memory, so bytes decide and arithmetic is free. One program serves every
shape, so where the shape would decide, a middling one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from turbotx import ir
from turbotx.ir.expr import ZERO, Expr, evaluate, spell_out
from turbotx.ir.printer import show_expr
from turbotx.kernels.fusion.traffic import kernel_traffic

# Every run-time size, where two sums of bytes are to be compared.
MIDDLING = 64


@dataclass(frozen=True)
class Choice:
    """What a region moves, in bytes, if `value` is stored by one kernel for another, and if not."""

    value: str
    stored_nbytes: Expr
    recomputed_nbytes: Expr

    @property
    def is_stored(self) -> bool:
        """Equal bytes are no reason to hold a tensor."""
        return compare_nbytes(self.stored_nbytes, self.recomputed_nbytes) < 0

    def __str__(self) -> str:
        ways = ["is stored, not computed again", "is computed again, not stored"]
        figures = [show_expr(self.stored_nbytes), show_expr(self.recomputed_nbytes)]
        if not self.is_stored:
            ways, figures = ways[::-1], figures[::-1]
        return f"{self.value} {ways[0]}: {figures[0]} rather than {figures[1]} bytes"


def moved_nbytes(kernels: Sequence[ir.Kernel]) -> Expr:
    """Return the bytes that kernels read and write, one after the other."""
    found = [kernel_traffic(kernel) for kernel in kernels]
    return sympy.expand(sum((t.read_nbytes + t.written_nbytes for t in found), ZERO))


def compare_nbytes(a: Expr, b: Expr) -> int:
    """Return a number below, equal to or above zero as `a` is less, as much or more than `b`."""
    difference = spell_out(sympy.expand(a - b))
    for size in (MIDDLING, 16 * MIDDLING):
        try:
            return evaluate(difference, {s.name: size for s in difference.free_symbols})
        except ArithmeticError:  # no size that this model takes: it divides by zero
            continue
    return 0
