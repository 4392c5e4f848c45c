"""Tokens: the form of a tensor whose rows are tokens, once they are packed.

In: a node over (batch, seq). Out: a `ByToken`: the equivalent node over one token axis, and where
batch and columns are in its dims, for example::

    view(linear, [batch, seq, 12, 32])  ->  ByToken(view, (("b",), ("s",), (12,), (32,)))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import sympy
from torch import fx

from turbotx.errors import PackError
from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import Expr

Factor = str | int
Dims = tuple[tuple[Factor, ...], ...]
"""For each dim its factors, slowest first: "b" for the batch, "s" for the columns, numbers above
1."""


@dataclass(frozen=True)
class ByToken:
    """A tensor with one row per token. Element [.., t, ..] of `node` is the original's at
    token t's batch row, where dims say "b", and column. "b" has extent 1 in `node`, "s"
    that of all tokens."""

    node: Any
    dims: Dims

    @property
    def s(self) -> int:
        """The dim of the tokens."""
        return next(d for d, factors in enumerate(self.dims) if "s" in factors)

    @property
    def b(self) -> int | None:
        """The dim of the batch, if there is one."""
        return next((d for d, factors in enumerate(self.dims) if "b" in factors), None)


class Refused(Exception):
    """A node that mixes tokens, and why."""

    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(why)
        self.node, self.why = node, why

    def error(self, name: str) -> PackError:
        """Return the error to raise to the user."""
        place = g.place_of(self.node)
        return PackError(
            f"cannot pack {name}: {self.node.name}{f' ({place})' if place else ''} {self.why}\n"
            f"  {self.node.format_node()}\n"
            '  Leave out padding="packed", or compute this outside of the optimized module'
        )


@dataclass(frozen=True)
class TokenSizes:
    """The symbols of the batch (several, if inputs were captured with different ones) and of
    seq."""

    batch: frozenset[sympy.Symbol]
    seq: sympy.Symbol

    def is_batch(self, extent: Expr) -> bool:
        """Return whether an extent is the batch."""
        return extent in self.batch

    def is_seq(self, extent: Expr) -> bool:
        """Return whether an extent is the number of columns."""
        return bool(extent == self.seq)

    def varies(self, extent: Expr) -> bool:
        """Return whether an extent depends on either."""
        return bool(extent.free_symbols & (self.batch | {self.seq}))

    def fixed(self, extent: Expr) -> tuple[Factor, ...] | None:
        """Return the factors of a constant extent; None for others."""
        if not extent.is_Integer:
            return None
        return () if extent == 1 else (int(extent),)

    def regroup(self, dims: Dims, shape: Sequence[Expr]) -> Dims | None:
        """Return how a tensor's factors are grouped after a reshape; None if batch rows or columns
        would be split or reordered."""
        left = [f for factors in dims for f in factors]
        found: list[tuple[Factor, ...]] = []
        for extent in shape:
            taken = self._take(left, extent)
            if taken is None:
                return None
            found.append(taken)
        return None if left else tuple(found)

    def _take(self, left: list[Factor], extent: Expr) -> tuple[Factor, ...] | None:
        """Take factors from `left` whose product is `extent`."""
        number, symbols = extent.as_coeff_Mul()
        powers = symbols.as_powers_dict() if symbols != 1 else {}
        wanted = {"s" if self.is_seq(x) else "b" for x in powers}
        plain = all(p == 1 and (self.is_seq(x) or self.is_batch(x)) for x, p in powers.items())
        if not (number.is_Integer and plain):
            return None
        rest, taken = int(number), list[Factor]()
        while rest != 1 or wanted:
            if not left:
                return None
            factor = left.pop(0)
            if isinstance(factor, str):
                if factor not in wanted:
                    return None
                wanted.remove(factor)
            elif rest % factor == 0:
                rest //= factor
            elif rest > 1 and factor % rest == 0:
                left.insert(0, factor // rest)
                factor, rest = rest, 1
            else:
                return None
            taken.append(factor)
        return tuple(taken)


def extent_of(factors: Sequence[Factor]) -> int:
    """Return the extent of a packed dim without the tokens in it."""
    return prod(f for f in factors if isinstance(f, int))
