"""Compiled matcher: which sizes a capture serves, asked at every step of a generation.

In: a `Captured` and the shapes of a call's tensors. Out: the values of its dims, or None where it
may not hold, and `ShapeMatcher` is to say why; no sympy once it is made::

    CompiledMatcher(captured).match([(1, 1), (33, 0)])  ->  (1, 1, 33)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import sympy

from turbotx.capture.trace import Captured
from turbotx.ir.expr import compile_evaluator

_RELATIONS = {
    "<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt,
    "==": operator.eq, "!=": operator.ne,
}  # fmt: skip


class CompiledMatcher:
    """Reads each dim off one input's shape, and checks all sizes and guards as plain numbers.

    is_complete: False where a dim stands in no shape by itself, or a guard is no comparison; then
    nothing matches.
    """

    def __init__(self, captured: Captured) -> None:
        found: dict[str, tuple[int, int]] = {}
        for i, sizes in enumerate(captured.input_sizes):
            for d, size in enumerate(sizes):
                if size.is_Symbol:
                    found.setdefault(size.name, (i, d))
        conditions: list[Any] = [g.condition for g in captured.guards]
        self.is_complete = set(captured.dims) <= set(found) and all(
            isinstance(c, sympy.core.relational.Relational) for c in conditions
        )
        if not self.is_complete:
            return
        self._places = [found[name] for name in captured.dims]
        every = [size for sizes in captured.input_sizes for size in sizes]
        self._sizes = compile_evaluator(every, captured.dims)
        sides = [side for c in conditions for side in (c.lhs, c.rhs)]
        self._sides = compile_evaluator(sides, captured.dims)
        self._relations = [_RELATIONS[c.rel_op] for c in conditions]

    def match(self, shapes: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
        """Return the dims' values in order; the ranks have to be those of the capture."""
        if not self.is_complete:
            return None
        dims = tuple([shapes[i][d] for i, d in self._places])
        try:
            if min(dims) < 1 or self._sizes(*dims) != tuple([n for s in shapes for n in s]):
                return None
            sides = self._sides(*dims)
        except ZeroDivisionError:  # no size that the model takes
            return None
        pairs = zip(self._relations, sides[::2], sides[1::2], strict=True)
        return dims if all(holds(a, b) for holds, a, b in pairs) else None
