"""Copies: tensors and windows for copies with eager's strides, for raw reads and for outputs.

In: an operand of the program and eager's strides. Out: a tensor to copy into, and windows on it; no
launch is made here::

    lay_out("k_copied", k, strides)  ->  tensor (seq, batch, 64), window with eager's strides
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from turbotx import ir
from turbotx.capture.result_layouts import Fresh, order_of
from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import ONE, ZERO, Expr, product
from turbotx.ir.memory_order import by_order, inverse
from turbotx.ir.strides import contiguous_strides


def lay_out(
    name: str, operand: ir.Operand, strides: Sequence[Expr]
) -> tuple[ir.Tensor, ir.Operand]:
    """Return a new tensor and a window on it with the shape of `operand` and these strides.

    Strides with gaps are made dense: nothing reads the gaps.
    """
    order = order_of(operand.shape, strides)
    extents = by_order(operand.shape, order)
    dense = contiguous_strides(extents)
    laid = by_order(dense, inverse(order))
    tensor = ir.Tensor(name, "intermediate", operand.dtype, extents)
    return tensor, ir.Operand(name, operand.dtype, operand.shape, laid, ZERO)


def lay_out_returned(
    name: str, operand: ir.Operand, fresh: Fresh
) -> tuple[ir.Tensor, ir.Operand, ir.Operand, ir.Operand]:
    """Return the caller's tensor, the operand to read, the window to write, and the window to
    return.

    A dim of stride 0 repeats one element, which is written once.
    """
    shape, strides, kind = fresh.shape, fresh.strides, operand.dtype
    once = tuple(ONE if s == 0 else n for n, s in zip(shape, strides, strict=True))
    written = ir.Operand(name, kind, once, strides, fresh.offset)
    tensor = ir.Tensor(name, "output", kind, fresh.extents)
    return tensor, replace(operand, shape=once), written, replace(written, shape=shape)


def show_by_strides(node: fx.Node, given: fx.Node, source: ir.Operand) -> tuple[ir.Operand, Expr]:
    """Return the window of an `as_strided` call on its argument's memory, and how many elements
    follow the window's last one there.

    source: the argument, laid out as in eager.
    """
    value = g.tensor(node)
    shape, strides, start = g.shape(node), g.strides(node), g.size(value.storage_offset())
    furthest = sum(((n - 1) * s for n, s in zip(shape, strides, strict=True)), start)
    window = ir.Operand(source.tensor, g.dtype(node), shape, strides, source.offset + start)
    return window, (product(g.shape(given)) - 1 - furthest).expand()
