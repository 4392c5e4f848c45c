"""Quantized ops: written by `passes.quantize`; int8 with one scale per row, symmetric.

In: rows of floats. Out: rows of int8 with a float32 scale each, x ~ q * scale; and products of them
with exact sums. Scales and rounding are computed in float32 whatever x's dtype, so that equal rows
give the same integers on every path and in every reference::

    scale = row_scale(x)              # (.., 1): the row's largest magnitude / 127
    q = quantize_rows(x, scale)       # int8: round(x * (1 / scale)), halves to even
    quantized_linear(q, weight, bias, weight_scale, scale, torch.float32)
    weight_only_linear(x, weight, bias, weight_scale)   # rows stay in floating point

A row with a NaN or infinity has the scale NaN, and products with it are NaN. A row whose magnitudes
are all below 2^-100 is quantised as if its largest were 2^-100.
"""

from __future__ import annotations

from typing import Any

import torch

LEVELS = 127
SMALLEST = 2.0**-100
MAX_DEPTH = (2**31 - 1) // LEVELS**2
"""Largest number of int8 products whose sum always fits in int32."""

_library = torch.library.Library("turbotx", "FRAGMENT")
_library.define("row_scale(Tensor x) -> Tensor")
_library.define("quantize_rows(Tensor x, Tensor scale) -> Tensor")
_library.define(
    "quantized_linear(Tensor x, Tensor weight, Tensor? bias, Tensor weight_scale, Tensor? x_scale,"
    " ScalarType dtype) -> Tensor"
)
_library.define(
    "weight_only_linear(Tensor x, Tensor weight, Tensor? bias, Tensor weight_scale) -> Tensor"
)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _row_scale(x: torch.Tensor) -> torch.Tensor:
    """Return (.., 1): each row's largest magnitude over 127, in float32, or float64 for float64."""
    peak = _wide(x).abs().amax(-1, keepdim=True)
    return torch.where(peak < torch.inf, peak.clamp_min(SMALLEST) / LEVELS, torch.nan)


def unrounded_rows(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return x / scale before rounding; 0 in rows without a valid scale."""
    value = _wide(x) * (1 / scale)
    return torch.where(value.abs() <= LEVELS + 0.5, value, 0.0)


def _quantize_rows(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return unrounded_rows(x, scale).round().to(torch.int8)


def _quantized_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weight_scale: torch.Tensor,
    x_scale: torch.Tensor | None, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Return x_scale * weight_scale * (x weight^T) + bias in `dtype`, with exact sums.

    x: int8 (.., k) with x_scale (.., 1); or floats with x_scale None, quantised first, in float32.
    weight: int8 (n, k); weight_scale: (n,).
    """
    if x_scale is None:
        narrow = x.float()  # float64 too, so that a reference has the same integers
        x_scale = _row_scale(narrow)
        x = _quantize_rows(narrow, x_scale)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] and hasattr(torch, "_int_mm") and rows.device.type == "cpu":
        sums = torch._int_mm(rows.contiguous(), weight.t())  # private API; exact, like float64
    else:
        sums = rows.double() @ weight.t().double()
    shape = (*x.shape[:-1], weight.shape[0])
    made = sums.to(wide).reshape(shape) * (x_scale.to(wide) * weight_scale.to(wide))
    return (made if bias is None else made + bias.to(wide)).to(dtype)


def _weight_only_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weight_scale: torch.Tensor
) -> torch.Tensor:
    """Return weight_scale * (x weight^T) + bias in x's dtype, summed in float32, or float64 for
    float64.

    x: floats (.., k); weight: int8 (n, k); weight_scale: (n,).
    """
    wide = _wide(x)
    made = wide @ weight.t().to(wide.dtype) * weight_scale.to(wide.dtype)
    return (made if bias is None else made + bias.to(wide.dtype)).to(x.dtype)


def _fake_row_scale(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], 1, dtype=_wide(x).dtype)


def _fake_quantize_rows(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


def _fake_quantized_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weight_scale: torch.Tensor,
    x_scale: torch.Tensor | None, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)


def _fake_weight_only_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weight_scale: torch.Tensor
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


for _name, _meaning, _fake in (
    ("row_scale", _row_scale, _fake_row_scale),
    ("quantize_rows", _quantize_rows, _fake_quantize_rows),
    ("quantized_linear", _quantized_linear, _fake_quantized_linear),
    ("weight_only_linear", _weight_only_linear, _fake_weight_only_linear),
):
    _library.impl(_name, _meaning, "CompositeExplicitAutograd")
    torch.library.register_fake(f"turbotx::{_name}", _fake, lib=_library)

row_scale: Any = torch.ops.turbotx.row_scale.default
quantize_rows: Any = torch.ops.turbotx.quantize_rows.default
quantized_linear: Any = torch.ops.turbotx.quantized_linear.default
weight_only_linear: Any = torch.ops.turbotx.weight_only_linear.default
QUANTIZED_LINEARS = (quantized_linear, weight_only_linear)
"""Products with an int8 weight; its scale is the fourth argument of both."""
