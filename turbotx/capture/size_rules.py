"""Size rules: converts a capture's size guards from symbolic expressions to plain data.

In: the inputs' sizes as expressions over the dims, and guards. Out: the data by which
`ShapeMatcher` decides whether a capture serves a call::

    2*seq + 1  ->  InputSize(Sizes(("seq * 2 + 1",)), ("seq",), solve=("seq", 2, 1), ...)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sympy

from turbotx.capture.guards import Guard
from turbotx.capture.shape_matcher import InputSize, SizeGuard, SizeRules
from turbotx.ir.expr import Expr, sizes_of, spell_out


def find_size_rules(
    dims: Sequence[str], names: Sequence[str], sizes: Sequence[Sequence[Expr]],
    guards: Iterable[Guard],
) -> SizeRules:  # fmt: skip
    """Return the rules of a capture. names, sizes: of its inputs, in order.

    Raises VerifyError for a guard with an unsupported function.
    """
    rows = zip(names, sizes, strict=True)
    return SizeRules(
        tuple(dims),
        tuple((name, tuple(map(_input_size, shape))) for name, shape in rows),
        tuple(SizeGuard(sizes_of([g.condition]), _names(g.condition), g.text) for g in guards),
    )


def _input_size(size: Expr) -> InputSize:
    spelled = spell_out(size)
    names = _names(spelled)
    return InputSize(sizes_of([spelled]), names, _solve(spelled), str(size))


def _names(value: Any) -> tuple[str, ...]:
    return tuple(sorted(s.name for s in spell_out(value).free_symbols))


def _solve(size: Expr) -> tuple[str, int, int] | None:
    """Return the single unknown of a linear size, its slope and the constant; None for other
    sizes."""
    if len(size.free_symbols) != 1:
        return None
    (unknown,) = size.free_symbols
    rest = size.xreplace({unknown: sympy.Integer(0)})
    slope = sympy.expand(size).coeff(unknown, 1)
    linear = sympy.expand(slope * unknown + rest - size) == 0
    if not (linear and slope.is_Integer and rest.is_Integer and slope != 0):
        return None
    return unknown.name, int(slope), int(rest)
