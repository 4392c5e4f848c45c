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


def _row_scale(m: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    x, last = node.args[0], len(index) - 1
    (peak,), _ = m.reduce_dims(
        "max", x, (last,), index, torch.float32, before=lambda v: m.call("abs", v)
    )
    scale = m.call("div_rn", m.call("maximum", peak, SMALLEST), LEVELS[_kind(node)])
    return m.where(peak < math.inf, scale, math.nan)


def _quantize_rows(m: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    x, scale = (g.operand(node, k) for k in range(2))
    value = m.cast(m.element(x, index), torch.float32)
    value = value * m.call("div_rn", 1.0, m.element(scale, (*index[:-1], ZERO)))
    kind = _kind(node)
    inside = m.call("abs", value) <= LEVELS[kind] + 0.5  # 0 in rows whose scale is NaN
    value = m.where(inside, value, 0.0)
    return value if kind.is_floating_point else m.round_to_int8(value)  # a store rounds to fp8


def _quantize_affine(m: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    x, inverse, shift, low, high = node.args
    value = m.call("round", m.cast(m.element(x, index), torch.float32) * float(inverse))
    value = m.call("maximum", value + float(shift), float(low))
    return m.call("minimum", value, float(high))


def _quantize_affine_by(m: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    x, scale, zero, middle, low, high = node.args
    step = m.cast(m.element(scale, (ZERO,)), torch.float32)
    shift = m.cast(m.element(zero, (ZERO,)), torch.float32) - float(middle)
    value = m.cast(m.element(x, index), torch.float32) * m.call("div_rn", 1.0, step)
    value = m.call("maximum", m.call("round", value) + shift, float(low))
    return m.call("minimum", value, float(high))


indexed("turbotx.quantize_affine.default", _quantize_affine)
indexed("turbotx.quantize_affine.tensor", _quantize_affine_by)
indexed("turbotx.row_scale.default", _row_scale, True)
indexed("turbotx.quantize_rows.default", _quantize_rows)
