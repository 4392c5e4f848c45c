"""Loops: the axes of a kernel while it is being lowered, and exact arithmetic on indices.

In: the extents of outputs and reductions. Out: index expressions over axis symbols, split where a
reshape needs a factor of them, and the choice of which axes reductions run over, for example::

    loops.split(32*@h + @d, 32)  ->  (@h, @d)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod

from turbotx import ir
from turbotx.ir.expr import ZERO, Expr, divide, is_nonnegative, product
from turbotx.ir.views import reshape_index


class FusionConflict(Exception):
    """`node` cannot be computed inside this kernel; the message says why, for the report."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node


class NeedsAxisSplit(Exception):
    """An index needs axis `name` as two: lowering starts again with it split."""

    def __init__(self, name: str, inner: Expr) -> None:
        super().__init__(name)
        self.name, self.inner = name, inner


@dataclass
class LoopNest:
    """The axes made so far; `rows` are those that reductions run over."""

    splits: dict[str, list[Expr]]
    axes: dict[str, Expr] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)
    _bounds: dict[Expr, tuple[Expr | None, Expr | None]] = field(default_factory=dict)

    def make(self, extent: Expr, name: str) -> Expr:
        """Return the index expression of a new loop over `extent`, split as asked before."""
        if extent == 1:
            return ZERO
        inner = self.splits.get(name)
        if inner is None:
            self.axes[name] = extent
            return ir.axis_symbol(name)
        outer = divide(extent, inner[0])
        assert outer is not None
        high = self.make(outer, f"{name}h")
        return (high * inner[0] + self.make(inner[0], f"{name}l")).expand()

    def bounds(
        self, value: Expr, extents: Mapping[str, Expr] = {}
    ) -> tuple[Expr | None, Expr | None]:
        """Return the smallest and largest value of an affine index, None where unknown.

        extents: of axes that are no loops.
        """
        if extents:
            return self.find_bounds(value, {**self.axes, **extents})
        if value not in self._bounds:  # an axis keeps its extent
            self._bounds[value] = self.find_bounds(value, self.axes)
        return self._bounds[value]

    def find_bounds(self, value: Expr, axes: Mapping[str, Expr]) -> tuple[Expr | None, Expr | None]:
        """Derive the bounds of an affine index from the extents of its axes, without the cache.
        Either is None where a gathered value or another index decides it."""
        low: list[Expr] = []
        high: list[Expr] = []
        steps: dict[sympy.Symbol, Expr] = {}
        for term in sympy.Add.make_args(sympy.expand(value)):
            places = [x for x in term.free_symbols if x.name[0] in "@%"]
            if not places:
                low.append(term)
                continue
            step = term / places[0]
            if len(places) > 1 or places[0].name[0] == "%" or places[0] in step.free_symbols:
                return None, None
            steps[places[0]] = steps.get(places[0], ZERO) + step
        high += low
        for symbol, step in steps.items():
            last = step * (axes[symbol.name[1:]] - 1)
            if is_nonnegative(step):
                high.append(last)
            elif is_nonnegative(-step):
                low.append(last)
            else:
                return None, None
        return sympy.expand(sympy.Add(*low)), sympy.expand(sympy.Add(*high))

    def split(self, flat: Expr, by: Expr) -> tuple[Expr, Expr]:
        """Return (flat // by, flat % by), exactly; asks for an axis to be split if that helps.
        Raises NeedsAxisSplit where a split would help."""
        quotient, rest = _take_multiples(flat, by)
        if rest == 0:
            return quotient, ZERO
        if self._lies_below(rest, by):
            return quotient, rest
        # An index that runs backwards: floor(r / n) = -floor((n - 1 - r) / n).
        back, turned = _take_multiples(by - 1 - rest, by)
        if self._lies_below(turned, by):
            return quotient - back, sympy.expand(rest + back * by)
        low, _ = self.bounds(rest)
        for name, extent in self.axes.items():
            step = rest.coeff(ir.axis_symbol(name))
            inner = divide(by, step) if step != 0 else None
            if inner is None or not is_nonnegative(inner - 1):  # an index that runs backwards
                continue
            if inner not in (1, extent) and divide(extent, inner) is not None:
                raise NeedsAxisSplit(name, inner)
        if low is None or not is_nonnegative(low):
            # Python rounds a negative quotient down, C and Triton up: divide what is divisible.
            remains = Mod(sympy.expand(flat), by)
            return quotient + FloorDiv(rest - remains, by), remains
        return quotient + FloorDiv(rest, by), Mod(rest, by)

    def _lies_below(self, value: Expr, limit: Expr) -> bool:
        """Return whether 0 <= value < limit is known."""
        low, high = self.bounds(value)
        known = low is not None and high is not None
        return known and is_nonnegative(low) and is_nonnegative(limit - 1 - high)

    def row_index(
        self, extents: tuple[Expr, ...], used: set[str], node: fx.Node
    ) -> tuple[Expr, ...]:
        """Return the index into a reduction's dims, on the row axes; choose those if need be.

        `used` are the axes of the place that the result stands at. Raises Conflict where the
        kernel's reductions already run over other axes. Raises FusionConflict where the run reduces
        over other axes.
        """
        if not self.rows:
            self.rows = self._choose_rows(extents, used)
        if used & set(self.rows):
            raise FusionConflict(
                node, f"{node.name} reduces over another axis than the rest of the run"
            )
        lengths = [self.axes[n] for n in self.rows]
        symbols = [ir.axis_symbol(n) for n in self.rows]
        long = [e for e in extents if e != 1]
        if lengths == long:
            rest = iter(symbols)
            return tuple(ZERO if e == 1 else next(rest) for e in extents)
        if product(lengths) != product(extents):
            shown = " x ".join(map(str, lengths))
            raise FusionConflict(
                node, f"{node.name} reduces over {extents}, the run's rows are {shown}"
            )
        return reshape_index(symbols, lengths, extents, self.split)

    def _choose_rows(self, extents: tuple[Expr, ...], used: set[str]) -> list[str]:
        """Pick the loops that a reduction runs over: existing ones it is free of, or new ones.

        Sharing a loop with the elements that read the result is what keeps a row in registers.
        """
        free = [n for n in self.axes if n not in used]
        chosen: list[str] = []
        for extent in reversed([e for e in extents if e != 1]):
            match = next((n for n in reversed(free) if self.axes[n] == extent), None)
            if match is None:
                break
            free = free[: free.index(match)]
            chosen.insert(0, match)
        else:
            return chosen
        free = [n for n in self.axes if n not in used]
        if free and product([self.axes[n] for n in free]) == product(extents):
            return free
        before = set(self.axes)
        for k, extent in enumerate(extents):
            self.make(extent, f"r{k}")
        made = [n for n in self.axes if n not in before]
        return made or [next(iter(self.axes))]


def _take_multiples(value: Expr, by: Expr) -> tuple[Expr, Expr]:
    """Return the terms that are multiples of `by`, divided by it, and the sum of the others."""
    quotient, rest = ZERO, ZERO
    for term in sympy.Add.make_args(sympy.expand(value)):
        whole = divide(term, by)
        if whole is None:
            rest += term
        else:
            quotient += whole
    return quotient, rest
