"""Quantize check: checks that the operands of every quantised product are consistent.

In: a rewritten graph. Out: nothing, or a VerifyError that names the node. Weights must be quantised
with the scales of their own rows, and depend on parameters alone; quantised rows are of the same
kind and come with their own scales, and no other op reads them::

    quantized_linear(quantize_rows(x, s), ..., t, float32)  ->  VerifyError: scaled by t, not by s
"""

from __future__ import annotations

import torch
from torch import fx

from turbotx.errors import VerifyError
from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import ONE
from turbotx.ir.int4_ops import group_scale, quantize_groups
from turbotx.ir.quantized_ops import (
    LEVELS,
    MAX_DEPTH,
    QUANTIZED_LINEARS,
    QUANTIZES,
    quantize_affine,
    quantize_affine_by,
    quantize_rows,
    quantized_linear,
    row_scale,
)
from turbotx.ir.views import is_view, view_source


def check_quantized(graph: fx.Graph) -> None:
    """Raise VerifyError for the first quantised product that is not consistent."""
    for node in graph.nodes:
        if g.is_call(node, *QUANTIZES):
            x, scale = g.operand(node, 0), g.operand(node, 1)
            grouped = g.is_call(node, quantize_groups)
            if not g.is_call(scale, group_scale if grouped else row_scale) or (
                scale.args[0] is not x or scale.args[1:2] != node.args[2:]
            ):
                raise VerifyError(f"{node.name} is quantised by {scale.name}, not its rows' scale")
            wrong = [u.name for u in node.users if not g.is_call(u, *QUANTIZED_LINEARS)]
            if wrong:
                raise VerifyError(f"{wrong[0]} reads the int8 rows {node.name} as they are")
        elif g.is_call(node, *QUANTIZED_LINEARS):
            _check_product(node)


def _check_product(node: fx.Node) -> None:
    x, weight, scale = (g.operand(node, k) for k in (0, 1, 3))
    width, depth = g.shape(weight)
    given = weight.op == "get_attr" and g.dtype(weight) in LEVELS
    if not (given or g.is_call(weight, *QUANTIZES)) or not _is_constant(weight):
        raise VerifyError(f"the weight of {node.name}, {weight.name}, is no quantised parameter")
    shown = scale
    while is_view(shown):
        shown = view_source(shown)
    grouped = g.is_call(weight, quantize_groups)
    if grouped:
        depth = g.shape(g.operand(weight, 0))[1]
    flat = g.shape(scale)[:1] if grouped else g.shape(scale)
    own_scale = given or (shown is weight.args[1] and not (grouped and scale is not shown))
    if not own_scale or flat != (width,) or not _is_constant(scale):
        raise VerifyError(f"{node.name} scales its columns by {shown.name}, not its weight's scale")
    exact = g.is_call(node, quantized_linear)
    if exact and grouped:
        raise VerifyError(f"{node.name} multiplies int8 rows by int4, which no product does")
    overflows = exact and g.dtype(weight) is torch.int8 and int(depth) > MAX_DEPTH
    if g.shape(x)[-1] != depth or overflows:
        raise VerifyError(f"{node.name} sums {g.shape(x)[-1]} products over weights of {depth}")
    own = g.optional(node, 4)
    if own is None and g.is_call(x, quantize_affine, quantize_affine_by):
        return
    if own is None:
        if not g.dtype(x).is_floating_point:
            raise VerifyError(f"{node.name} takes {x.name} for floats, of {g.dtype(x)}")
        return
    if g.dtype(x) is not g.dtype(weight) or not g.is_call(x, quantize_rows) or x.args[1] is not own:
        raise VerifyError(f"{node.name} scales its rows by {own.name}, not by {x.name}'s scale")
    if g.shape(own)[-1] != ONE:
        raise VerifyError(f"{own.name} holds {g.shape(own)}, not a number a row")


def _is_constant(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    return bool(node.all_input_nodes) and all(map(_is_constant, node.all_input_nodes))
