"""Cache stores: the launch that writes one layer's new keys or values into a cache.

In: where a layer's rows lie in the cache's memory, and the new ones. Out: the sizes of
`ttx_store_rows`, strides and offsets in bytes::

    sizes: batch, heads, rows, bytes of a row; strides of batch, head and row where the rows come
        from, and of batch and head where they go, and where the first goes
"""

from __future__ import annotations

from turbotx import ir
from turbotx.ir.expr import Expr


def describe_store(held: ir.Operand, new: ir.Operand) -> tuple[Expr, ...]:
    """Return a store's sizes.

    held: all rows of a layer after the call, (batch, heads, length, width), in the memory. new:
    (batch, heads, rows, width), the last of them, elements of a row side by side.
    """
    batch, heads, count, width = new.shape
    nbytes = new.dtype.itemsize
    first = (held.shape[2] - count) * width
    steps = [s * nbytes for s in (*new.strides[:3], *held.strides[:2], first)]
    return batch, heads, count, width * nbytes, *steps
