"""Quantized ops: written by `passes.quantize`; int8 or fp8 with one scale per row, symmetric.

In: rows of floats. Out: rows of int8, or of another kind of `LEVELS`, with a float32 scale each,
x ~ q * scale; and products of them, of int8 with exact sums. Scales and rounding are computed in
float32 whatever x's dtype, so that equal rows give equal numbers on every path and in every
reference::

    scale = row_scale(x)              # (.., 1): the row's largest magnitude / 127
    q = quantize_rows(x, scale)       # int8: round(x * (1 / scale)), halves to even
    q = quantize_rows(x, row_scale(x, kind), kind)   # kind: torch.float8_e4m3fn
    quantized_linear(q, weight, bias, weight_scale, scale, torch.float32)
    weight_only_linear(x, weight, bias, weight_scale)   # rows stay in floating point

A row with a NaN or infinity has the scale NaN, and products with it are NaN. A row whose magnitudes
are all below 2^-100 is quantised as if its largest were 2^-100.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from turbotx.errors import ModelChangedError
from turbotx.ir.int4_ops import (
    GROUP,
    SMALLEST,
    dequantize_groups,
    divide,
    group_scale,
    quantize_groups,
)

LEVELS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Kinds of quantised rows: what the largest magnitude of a row becomes."""
KIND_NAMES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8", torch.uint8: "int4"}
"""Of weights; bytes are two numbers of int4 each."""
MAX_DEPTH = int((2**31 - 1) // LEVELS[torch.int8] ** 2)
"""Largest number of int8 products whose sum always fits in int32."""

_library = torch.library.Library("turbotx", "FRAGMENT")
_library.define("row_scale(Tensor x, ScalarType kind=int8) -> Tensor")
_library.define("quantize_rows(Tensor x, Tensor scale, ScalarType kind=int8) -> Tensor")
_library.define("if_zeros(Tensor x, Tensor zeros) -> Tensor")
_library.define("quantize_affine(Tensor x, float inverse, int shift, int low, int high) -> Tensor")
_library.define(
    "quantize_affine.tensor(Tensor x, Tensor scale, Tensor zero, int middle, int low, int high)"
    " -> Tensor"
)
_library.define(
    "quantized_linear(Tensor x, Tensor weight, Tensor? bias, Tensor weight_scale, Tensor? x_scale,"
    " ScalarType dtype) -> Tensor"
)
_library.define(
    "weight_only_linear(Tensor x, Tensor weight, Tensor? bias, Tensor weight_scale) -> Tensor"
)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _row_scale(x: torch.Tensor, kind: torch.dtype = torch.int8) -> torch.Tensor:
    """Return (.., 1): each row's largest magnitude over the largest of `kind`, in float32, or
    float64 for float64."""
    peak = _wide(x).abs().amax(-1, keepdim=True)
    scale = divide(peak.clamp_min(SMALLEST), LEVELS[kind])
    return torch.where(peak < torch.inf, scale, torch.nan)


def unrounded_rows(
    x: torch.Tensor, scale: torch.Tensor, kind: torch.dtype = torch.int8
) -> torch.Tensor:
    """Return x / scale before rounding; 0 in rows without a valid scale."""
    value = _wide(x) * (1 / scale)
    return torch.where(value.abs() <= LEVELS[kind] + 0.5, value, 0.0)


def _quantize_rows(
    x: torch.Tensor, scale: torch.Tensor, kind: torch.dtype = torch.int8
) -> torch.Tensor:
    value = unrounded_rows(x, scale, kind)
    return (value if kind.is_floating_point else value.round()).to(kind)


def unrounded_affine(
    x: torch.Tensor, inverse: float, shift: int, low: int, high: int
) -> torch.Tensor:
    """Return what `quantize_affine` rounds."""
    return (_wide(x) * inverse + shift).clamp(low, high)


def _if_zeros(x: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Return x; raise ModelChangedError where zero points are none that a program was made for."""
    if bool(zeros.any()):
        raise ModelChangedError("zero points of an int8 weight are no longer 0")
    return x.clone()


def unrounded_affine_by(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, middle: int, low: int, high: int
) -> torch.Tensor:
    """Return what `quantize_affine.tensor` rounds."""
    return (_wide(x) * (1 / scale).to(_wide(x).dtype) + (zero - middle)).clamp(low, high)


def _quantize_affine_by(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, middle: int, low: int, high: int
) -> torch.Tensor:
    """Return the same by numbers that a call finds: scale and zero of one element each."""
    rounded = (_wide(x) * (1 / scale).to(_wide(x).dtype)).round()
    return (rounded + (zero - middle)).clamp(low, high).to(torch.int8)


def _quantize_affine(
    x: torch.Tensor, inverse: float, shift: int, low: int, high: int
) -> torch.Tensor:
    """Return round(x * inverse) + shift within [low, high], int8: by numbers that are not x's."""
    return ((_wide(x) * inverse).round() + shift).clamp(low, high).to(torch.int8)


def _quantized_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weight_scale: torch.Tensor,
    x_scale: torch.Tensor | None, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Return x_scale * weight_scale * (x weight^T) + bias in `dtype`, with exact sums of int8;
    those of fp8 in float32, or float64 for that.

    x: of weight's kind, (.., k), with x_scale (.., 1), None for ones, or floats to be quantised
    first, in float32. weight: int8 or fp8 (n, k), weight_scale: (n,).
    """
    kind = weight.dtype
    if x.dtype is kind:
        x_scale = weight_scale.new_ones(1) if x_scale is None else x_scale
    else:
        narrow = x.float()  # of float64 too: a reference is to have the same integers
        x_scale = _row_scale(narrow, kind)
        x = _quantize_rows(narrow, x_scale, kind)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    rows = x.reshape(-1, x.shape[-1])
    if kind.is_floating_point:
        sums = rows.to(wide) @ weight.t().to(wide)
    elif rows.shape[0] and hasattr(torch, "_int_mm") and rows.device.type == "cpu":
        sums = torch._int_mm(rows.contiguous(), weight.t())  # private API; exact, like float64
    else:
        sums = rows.double() @ weight.t().double()
    shape = (*x.shape[:-1], weight.shape[0])
    made = sums.to(wide).reshape(shape) * (x_scale.to(wide) * weight_scale.to(wide))
    return (made if bias is None else made + bias.to(wide)).to(dtype)


def _weight_only_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weight_scale: torch.Tensor
) -> torch.Tensor:
    """Return weight_scale * (x weight^T) + bias in x's dtype, sums in float32, or float64 of
    float64. x: floats (.., k); weight: int8 (n, k), weight_scale: (n,); or both as `int4_ops` has
    them."""
    wide = _wide(x)
    if weight.dtype is torch.uint8:
        floats = dequantize_groups(weight, weight_scale.to(wide.dtype), x.shape[-1])
        made = wide @ floats.t()
    else:
        made = wide @ weight.t().to(wide.dtype) * weight_scale.to(wide.dtype)
    return (made if bias is None else made + bias.to(wide.dtype)).to(x.dtype)


def _fake_row_scale(x: torch.Tensor, kind: torch.dtype = torch.int8) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], 1, dtype=_wide(x).dtype)


def _fake_rows(
    x: torch.Tensor, scale: torch.Tensor, kind: torch.dtype = torch.int8
) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=kind)


def _fake_affine(x: torch.Tensor, *numbers: Any) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


def _fake_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weight_scale: torch.Tensor,
    x_scale: torch.Tensor | None = None, dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)


for _name, _meaning, _fake in (
    ("row_scale", _row_scale, _fake_row_scale),
    ("quantize_rows", _quantize_rows, _fake_rows),
    ("if_zeros", _if_zeros, lambda x, _: torch.empty_like(x)),
    ("quantize_affine", _quantize_affine, _fake_affine),
    ("quantize_affine.tensor", _quantize_affine_by, _fake_affine),
    ("quantized_linear", _quantized_linear, _fake_linear),
    ("weight_only_linear", _weight_only_linear, _fake_linear),
):
    _library.impl(_name, _meaning, "CompositeExplicitAutograd")
    torch.library.register_fake(f"turbotx::{_name}", _fake, lib=_library)

row_scale: Any = torch.ops.turbotx.row_scale.default
quantize_rows: Any = torch.ops.turbotx.quantize_rows.default
if_zeros: Any = torch.ops.turbotx.if_zeros.default
quantize_affine: Any = torch.ops.turbotx.quantize_affine.default
quantize_affine_by: Any = torch.ops.turbotx.quantize_affine.tensor
quantized_linear: Any = torch.ops.turbotx.quantized_linear.default
weight_only_linear: Any = torch.ops.turbotx.weight_only_linear.default
QUANTIZED_LINEARS = (quantized_linear, weight_only_linear)
"""Products by a quantised weight; of both, its scale is the fourth argument."""
QUANTIZES = (quantize_rows, quantize_groups)
"""What makes a weight's integers; of both, its scale is the second argument."""
SCALES = (row_scale, group_scale)


@dataclass(frozen=True)
class Scheme:
    """How a product is quantised. float_rows: its weight alone is. group: how many inputs share a
    scale of int4, 0: `kind`, of which a whole row does. shifted: groups have offsets too."""

    float_rows: bool = False
    group: int = 0
    shifted: bool = False
    kind: torch.dtype = torch.int8

    def scale_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the scales of a weight, (n, 1), (n, groups) or (n, groups, 2)."""
        if not self.group:
            return row_scale(rows, self.kind)
        return group_scale(rows, self.group, self.shifted)

    def integers_of(self, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return a weight's numbers by its scales, of `kind` or two of int4 to a byte."""
        if not self.group:
            return quantize_rows(rows, scale, self.kind)
        return quantize_groups(rows, scale, self.group)


SCHEMES = {
    "int8": Scheme(),
    "fp8": Scheme(kind=torch.float8_e4m3fn),
    "int8-weights": Scheme(float_rows=True),
    "int4-weights": Scheme(float_rows=True, group=GROUP),
}
"""What the option `quantize` stands for."""
