"""Heads: shows operands of attention with any leading dims as (batch, heads, rows, columns).

In: products over (batch, heads, q, k), over (batch, heads, windows, q, k), or over (batch * heads,
q, k), as einsum makes them, and views between these. Out: `Heads`, which converts an operand to two
leading dims, and a result back to the product's, for example::

    lead (batch, heads, windows), axis 1:  (b, h, w, q, k)  ->  (b * w, h, q, k)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import Expr, product
from turbotx.ir.strides import layout_with_copies
from turbotx.ir.views import VIEWS
from turbotx.passes.canonicalize import moves_only_ones

aten = torch.ops.aten


def plain_source(x: fx.Node) -> fx.Node | None:
    """Return the source of views that only regroup the dims before rows and columns, with no other
    users; None if there is none."""
    wanted, y = g.shape(x)[-2:], x
    while _keeps_order(y):
        y = g.operand(y, 0)
        if len(g.shape(y)) >= 3 and g.shape(y)[-2:] == wanted:
            return y
        if len(y.users) > 1:
            return None
    return None


def _keeps_order(x: fx.Node) -> bool:
    """Return whether a view keeps the elements in row-major order."""
    return VIEWS.get(x.target) == "reshape" or moves_only_ones(x)


@dataclass(frozen=True)
class Heads:
    """The leading dims of scores, and which of them is heads; 3-D scores have their product."""

    lead: tuple[Expr, ...]
    axis: int

    @staticmethod
    def of(product_: Any, v: Any, shown: list[Any]) -> Heads | None:
        """Find the leading dims in the shapes of scores or operands.

        product_: the first product.
        shown: scores and weights in between, and the last product.
        """
        if not all(g.is_tensor(n) and len(g.shape(n)) >= 3 for n in (*shown, v)):
            return None
        node = shown[-1]
        leads = {g.shape(n)[:-2] for n in shown if len(g.shape(n)) > 3}
        if not leads:
            operands = (*product_.args, v)
            sources = [s for n in operands for s in [_merged(n)] if s is not None]
            leads = {g.shape(s)[:-2] for s in sources + [u for u in node.users if _splits(u)]}
            count = g.shape(product_)[0]
            leads = {n for n in leads if (product(n) - count).expand() == 0 and n[-1].is_Integer}
        if len(leads) > 1:
            return None
        lead = next(iter(leads), (g.shape(product_)[0], g.size(1)))
        axis = len(lead) - 1
        if len(g.shape(node)) == len(lead) + 2 > 4:
            axis = _innermost(v, axis)
        return Heads(lead, axis)

    @property
    def batch(self) -> Expr:
        """The product of all leading dims except heads."""
        return product([n for d, n in enumerate(self.lead) if d != self.axis])

    @property
    def heads(self) -> Expr:
        """The number of heads."""
        return self.lead[self.axis]

    def split(self, x: Any) -> Any:
        """Return (batch, heads, rows, columns) of an operand or of scores, or None."""
        if x is None:
            return x
        rank = len(g.shape(x))
        order = list(range(rank))
        if g.is_call(x, aten.permute.default) and list(x.args[1]) == [
            *order[:-2], rank - 1, rank - 2,
        ]:  # fmt: skip
            source = self.split(x.args[0])
            return None if source is None else g.emit(x, aten.permute.default, source, [0, 1, 3, 2])
        if rank == len(self.lead) + 2:
            return self._merge(x) if rank == 4 or g.shape(x)[:-2] == self.lead else None
        if rank != 3:
            return None
        source = _merged(x)
        if source is not None and g.shape(source)[:-2] == self.lead:
            return self._merge(source)
        if self.heads == 1:
            return g.emit(x, aten.unsqueeze.default, x, 1)
        new = g.emit(x, aten.unflatten.int, x, 0, [-1, int(self.heads)])
        return new if g.shape(new)[:2] == (self.batch, self.heads) else None

    def _merge(self, x: Any) -> Any:
        """Merge all leading dims except heads."""
        count = len(self.lead)
        if count == 2:
            return x
        order = [d for d in range(count) if d != self.axis]
        x = g.emit(x, aten.permute.default, x, [*order, self.axis, count, count + 1])
        return g.emit(x, aten.flatten.using_ints, x, 0, count - 2)

    def beside(self, operand: fx.Node, rank: int) -> Any:
        """Return an operand added to scores of `rank` dims in a form that fits 4-D scores; None if
        it varies over some but not all of the merged dims."""
        shape = g.shape(operand)
        if rank == 3:
            return operand if len(shape) < 3 or shape[0] == 1 else self.split(operand)
        if rank != len(self.lead) + 2:
            return None
        if rank == 4 or len(shape) < 3:
            return operand
        for _ in range(rank - len(shape)):
            operand = g.emit(operand, aten.unsqueeze.default, operand, 0)
        shape = g.shape(operand)
        # Differently named sizes were equal in the traced sum; launches require it.
        ones = {shape[d] == 1 for d, n in enumerate(self.lead) if d != self.axis and n != 1}
        return self._merge(operand) if len(ones) < 2 else None

    def show(self, node: fx.Node, new: fx.Node) -> fx.Node:
        """Return (batch, rows, heads, columns) with the dims of the product `node`."""
        rank, count = len(g.shape(node)), len(self.lead)
        if rank == 3 or count == 2:
            new = g.emit(node, aten.permute.default, new, [0, 2, 1, 3])
            return g.emit(node, aten.flatten.using_ints, new, 0, 1) if rank == 3 else new
        order = [d for d in range(count) if d != self.axis]
        sizes: list[Any] = []
        for d in order:
            extent, unknown = self.lead[d], -1 not in sizes
            size: Any = int(extent) if extent.is_Integer else -1
            if size == -1 and not unknown:
                size = g.emit(node, aten.sym_size.int, node.args[1], d)
            sizes.append(size)
        new = g.emit(node, aten.unflatten.int, new, 0, sizes)
        places = [*order, count, self.axis, count + 1]
        return g.emit(node, aten.permute.default, new, [places.index(d) for d in range(rank)])


def _innermost(v: fx.Node, otherwise: int) -> int:
    """Return the leading dim of v whose stride is one row. Heads in that dim are read in place and
    written as the next GEMM reads them."""
    shape, steps = g.shape(v), layout_with_copies(v).strides[:-2]
    found = [d for d, s in enumerate(steps) if s == shape[-1] and shape[d] != 1]
    return found[0] if len(found) == 1 else otherwise


def _splits(x: fx.Node) -> bool:
    return VIEWS.get(x.target) == "reshape" and len(g.shape(x)) > 3


def _merged(x: Any) -> fx.Node | None:
    """Return the tensor of four or more dims of which `x` merges all but the last two.

    A dim of size 1 beside rows or columns, as einsum inserts it, is dropped.
    """
    if g.is_call(x, aten.permute.default):
        x = x.args[0]
    if not isinstance(x, fx.Node) or VIEWS.get(x.target) != "reshape":
        return None
    source, wanted = g.operand(x, 0), g.shape(x)[1:]
    shape = g.shape(source)
    if len(shape) > 3 and shape[-2:] == wanted:
        return source
    for d in range(len(shape) - 3, len(shape)) if len(shape) > 4 else ():
        if shape[d] == 1 and (*shape[:d], *shape[d + 1 :])[-2:] == wanted:
            return g.emit(x, aten.squeeze.dim, source, d)
    return None
