"""Loop nests: the axes of a kernel during lowering, and exact arithmetic on indices.

In: the extents of outputs and reductions. Out: index expressions over axis symbols, split where a
reshape needs it, and the choice of reduction axes, for example::

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
    """`node` cannot be computed in this kernel; the message says why, for the report."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node


class NeedsAxisSplit(Exception):
    """Axis `name` must be split in two: lowering restarts with it split."""

    def __init__(self, name: str, inner: Expr) -> None:
        super().__init__(name)
        self.name, self.inner = name, inner


@dataclass
class LoopNest:
    """The axes created so far; `rows` are the reduction axes."""

    splits: dict[str, list[Expr]]
    axes: dict[str, Expr] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)
    _bounds: dict[Expr, tuple[Expr | None, Expr | None]] = field(default_factory=dict)

    def make(self, extent: Expr, name: str) -> Expr:
        """Return the index expression of a new loop over `extent`, with the requested splits."""
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
        """Return the minimum and maximum of an affine index, None where unknown.

        extents: of axes that are not loops.
        """
        if extents:
            return self.find_bounds(value, {**self.axes, **extents})
        if value not in self._bounds:  # extents of axes do not change
            self._bounds[value] = self.find_bounds(value, self.axes)
        return self._bounds[value]

    def find_bounds(self, value: Expr, axes: Mapping[str, Expr]) -> tuple[Expr | None, Expr | None]:
        """Compute the bounds of an affine index from the extents of its axes, without the cache.

        A bound is None if it depends on a gathered value or is not affine.
        """
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
        """Return (flat // by, flat % by), exactly. Raises NeedsAxisSplit if splitting an axis
        simplifies it."""
        quotient, rest = _take_multiples(flat, by)
        if rest == 0:
            return quotient, ZERO
        if self._lies_below(rest, by):
            return quotient, rest
        # A decreasing index: floor(r / n) = -floor((n - 1 - r) / n).
        back, turned = _take_multiples(by - 1 - rest, by)
        if self._lies_below(turned, by):
            return quotient - back, sympy.expand(rest + back * by)
        low, _ = self.bounds(rest)
        for name, extent in self.axes.items():
            step = rest.coeff(ir.axis_symbol(name))
            inner = divide(by, step) if step != 0 else None
            if inner is None or not is_nonnegative(inner - 1):  # a decreasing index
                continue
            if inner not in (1, extent) and divide(extent, inner) is not None:
                raise NeedsAxisSplit(name, inner)
        if low is None or not is_nonnegative(low):
            # Python rounds negative quotients down, C and Triton up: make the division exact.
            remains = Mod(sympy.expand(flat), by)
            return quotient + FloorDiv(rest - remains, by), remains
        return quotient + FloorDiv(rest, by), Mod(rest, by)

    def _lies_below(self, value: Expr, limit: Expr) -> bool:
        """Return whether 0 <= value < limit is proven."""
        low, high = self.bounds(value)
        known = low is not None and high is not None
        return known and is_nonnegative(low) and is_nonnegative(limit - 1 - high)

    def row_index(
        self, extents: tuple[Expr, ...], used: set[str], node: fx.Node
    ) -> tuple[Expr, ...]:
        """Return the index into a reduction's dims, on the row axes; choose these if there are
        none.

        used: the axes that the result's position depends on. Raises FusionConflict if the kernel's
        reductions run over other axes.
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
        """Choose the axes of a reduction: existing ones that its result does not depend on, or new
        ones.

        Sharing a loop with the elements that read the result keeps a row in registers.
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
