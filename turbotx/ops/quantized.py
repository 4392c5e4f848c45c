"""Rows of the op table that quantise: a row's scale, and its elements as int8 or fp8.

In: a node and an index into its result. Out: the element there, with the arithmetic of
`ir.quantized_ops`. After a norm both are fused into its kernel, and the row is read once::

    quantize_rows(x, s)[row, col]         ->  cast(round(x[row, col] * (1 / s[row])), int8)
    quantize_affine(x, i, z, 0, 9)[r, c]  ->  cast(clamp(round(x[r, c] * i) + z, 0, 9), int8)

Divisions are correctly rounded on every target, so that equal rows give equal integers.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import ZERO, Expr
from turbotx.ir.int4_ops import SMALLEST
from turbotx.ir.quantized_ops import LEVELS
from turbotx.ops.table import indexed


def _kind(node: Any) -> torch.dtype:
    """Return what kind of numbers `row_scale` or `quantize_rows` is for."""
    made = {a for a in node.args if isinstance(a, torch.dtype)}
    return made.pop() if made else torch.int8


def _row_scale(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    x, last = node.args[0], len(index) - 1
    (peak,), _ = b.reduce_dims(
        "max", x, (last,), index, torch.float32, before=lambda v: b.call("abs", v)
    )
    scale = b.call("div_rn", b.call("maximum", peak, SMALLEST), LEVELS[_kind(node)])
    return b.where(peak < math.inf, scale, math.nan)


def _quantize_rows(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    x, scale = (g.operand(node, k) for k in range(2))
    value = b.cast(b.element(x, index), torch.float32)
    value = value * b.call("div_rn", 1.0, b.element(scale, (*index[:-1], ZERO)))
    kind = _kind(node)
    inside = b.call("abs", value) <= LEVELS[kind] + 0.5  # 0 in rows whose scale is NaN
    value = b.where(inside, value, 0.0)
    return value if kind.is_floating_point else b.round_to_int8(value)  # a store rounds to fp8


def _quantize_affine(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    x, inverse, shift, low, high = node.args
    value = b.call("round", b.cast(b.element(x, index), torch.float32) * float(inverse))
    value = b.call("maximum", value + float(shift), float(low))
    return b.call("minimum", value, float(high))


def _quantize_affine_by(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    x, scale, zero, middle, low, high = node.args
    step = b.cast(b.element(scale, (ZERO,)), torch.float32)
    shift = b.cast(b.element(zero, (ZERO,)), torch.float32) - float(middle)
    value = b.cast(b.element(x, index), torch.float32) * b.call("div_rn", 1.0, step)
    value = b.call("maximum", b.call("round", value) + shift, float(low))
    return b.call("minimum", value, float(high))


indexed("turbotx.quantize_affine.default", _quantize_affine)
indexed("turbotx.quantize_affine.tensor", _quantize_affine_by)
indexed("turbotx.row_scale.default", _row_scale, True)
indexed("turbotx.quantize_rows.default", _quantize_rows)
