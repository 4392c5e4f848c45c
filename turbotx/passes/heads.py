"""Heads: operands of attention with any dims before their rows as (batch, heads, rows, columns).

In: products over (batch, heads, q, k), over (batch, heads, windows, q, k), or over (batch * heads,
q, k), as einsum leaves them, and views that lead from one to the other. Out: `Heads`, which shows
an operand with two dims before its rows, and a result as the product's, for example::

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

aten = torch.ops.aten


def plain_source(x: fx.Node) -> fx.Node | None:
    """Return what views show otherwise in the dims before rows and columns alone, read by them
    only; None where there is no such tensor."""
    wanted, y = g.shape(x)[-2:], x
    while _keeps_order(y):
        y = g.operand(y, 0)
        if len(g.shape(y)) >= 3 and g.shape(y)[-2:] == wanted:
            return y
        if len(y.users) > 1:
            return None
    return None


def _keeps_order(x: fx.Node) -> bool:
    """Return whether a view shows all elements one after the other as they were."""
    if VIEWS.get(x.target) == "reshape":
        return True
    if not g.is_call(x, aten.permute.default):
        return False
    shape = g.shape(g.operand(x, 0))
    kept: list[int] = [d for d in g.argument(x, "dims") if shape[d] != 1]
    return kept == sorted(kept)


@dataclass(frozen=True)
class Heads:
    """The dims of scores before their rows and columns, and which of them counts heads; what has
    three dims has their product."""

    lead: tuple[Expr, ...]
    axis: int

    @staticmethod
    def of(product_: Any, v: Any, shown: list[Any]) -> Heads | None:
        """Find them in the shapes that scores or operands have somewhere.

        product_: the first product. shown: scores and shares on the way, and the last product.
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
        """How many batches of heads there are: the product of all dims but heads."""
        return product([n for d, n in enumerate(self.lead) if d != self.axis])

    @property
    def heads(self) -> Expr:
        """How many heads there are."""
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
        """Show all dims of `lead` but heads as one."""
        count = len(self.lead)
        if count == 2:
            return x
        order = [d for d in range(count) if d != self.axis]
        x = g.emit(x, aten.permute.default, x, [*order, self.axis, count, count + 1])
        return g.emit(x, aten.flatten.using_ints, x, 0, count - 2)

    def beside(self, operand: fx.Node, rank: int) -> Any:
        """Return what is added to scores of `rank` dims so that it fits those of four; None where
        it varies over some of the dims that are merged, and not over all."""
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
        # Sizes of other names are as large where the sum was traced; launches require it.
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
    """Return which dim of v before its rows steps from one row's end to the next one's start: heads
    that lie so are read in place, and written as the next GEMM reads them."""
    shape, steps = g.shape(v), layout_with_copies(v).strides[:-2]
    found = [d for d, s in enumerate(steps) if s == shape[-1] and shape[d] != 1]
    return found[0] if len(found) == 1 else otherwise


def _splits(x: fx.Node) -> bool:
    return VIEWS.get(x.target) == "reshape" and len(g.shape(x)) > 3


def _merged(x: Any) -> fx.Node | None:
    """Return the tensor of four dims or more that `x` merges all but the last two of.

    Where rows or columns stand beside a dim of size 1, as einsum has them, that one is dropped.
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
