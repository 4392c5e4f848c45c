"""Tokens: what is known of a tensor whose rows are tokens, and how it lies when they are packed.

In: a node over (batch, seq). Out: a `ByToken`: the node over one axis of tokens that stands for it,
and where the batch and the columns went; or a `Whole`, which is what it was, for example::

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
"""By dim its factors, from the slowest: "b" for the batch, "s" for the columns, numbers above 1."""


@dataclass(frozen=True)
class ByToken:
    """A tensor with one row a token. Element [.., t, ..] of `node` is the original's at token t's
    batch row, where dims say "b", and column; "b" has extent 1 in `node`, "s" all tokens."""

    node: Any
    dims: Dims

    @property
    def s(self) -> int:
        """Which dim the tokens lie along."""
        return next(d for d, factors in enumerate(self.dims) if "s" in factors)

    @property
    def b(self) -> int | None:
        """Which dim is the batch, if it has one."""
        return next((d for d, factors in enumerate(self.dims) if "b" in factors), None)


class Refused(Exception):
    """A node that does not keep tokens apart, and why."""

    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(why)
        self.node, self.why = node, why

    def error(self, name: str) -> PackError:
        """Return it as what a user meets."""
        place = g.place_of(self.node)
        return PackError(
            f"cannot pack {name}: {self.node.name}{f' ({place})' if place else ''} {self.why}\n"
            f"  {self.node.format_node()}\n"
            '  Leave out padding="packed", or compute this outside of the optimized module'
        )


@dataclass(frozen=True)
class TokenSizes:
    """The symbols that stand for the batch (several, where inputs were captured apart) and seq."""

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
        """Return the factors of an extent that is a number; None for others."""
        if not extent.is_Integer:
            return None
        return () if extent == 1 else (int(extent),)

    def regroup(self, dims: Dims, shape: Sequence[Expr]) -> Dims | None:
        """Return how the factors of a tensor stand in a reshape of it; None where a batch row or a
        column would be taken apart or change places."""
        left = [f for factors in dims for f in factors]
        found: list[tuple[Factor, ...]] = []
        for extent in shape:
            taken = self._take(left, extent)
            if taken is None:
                return None
            found.append(taken)
        return None if left else tuple(found)

    def _take(self, left: list[Factor], extent: Expr) -> tuple[Factor, ...] | None:
        """Take from `left` the factors whose product is an extent."""
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
    """Return the extent of a packed dim beside the tokens along it."""
    return prod(f for f in factors if isinstance(f, int))
