"""Rows of the op table that work elementwise.

In: elements of the arguments, in the compute dtype. Out: the result's element, for example::

    pointwise("aten.silu.default", lambda b, x: x * b.sigmoid(x))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from turbotx.ops.table import pointwise

# --- pointwise: arithmetic ------------------------------------------------------------------


def _scaled(b: Any, y: Any, alpha: Any) -> Any:
    return y if alpha == 1 else y * alpha


def _divide(b: Any, x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is None:
        return x / y
    return b.call("floordiv" if rounding_mode == "floor" else "truncdiv", x, y)


def _power(b: Any, x: Any, y: Any) -> Any:
    """Lower pow; small constant exponents become products and roots, as in PyTorch."""
    whole: dict[Any, Callable[[], Any]] = {
        1: lambda: x,
        2: lambda: x * x,
        3: lambda: x * x * x,
        0.5: lambda: b.call("sqrt", x),
        -0.5: lambda: b.call("rsqrt", x),
        -1: lambda: 1 / x,
        -2: lambda: 1 / (x * x),
    }
    value = b.constant_of(y)
    if x.is_float and value in whole:
        return whole[value]()
    if not x.is_float and value in (1, 2, 3):
        return whole[value]()
    return b.call("pow", x, y)


def _ignore_nan(b: Any, op: str, x: Any, y: Any) -> Any:
    larger = b.where(b.call("isnan", y), x, b.call(op, x, y))
    return b.where(b.call("isnan", x), y, larger)


def _signbit(b: Any, x: Any) -> Any:
    return b.call("copysign", b.constant(1, x.dtype), x) < 0 if x.is_float else x < 0


def _round(b: Any, x: Any, decimals: int) -> Any:
    """Lower round with decimals: scale by a power of ten and back, as PyTorch does."""
    scale = b.constant(10.0 ** abs(decimals), x.dtype)
    if decimals >= 0:
        return b.call("round", x * scale) / scale
    return b.call("round", x / scale) * scale


pointwise("aten.add.Tensor aten.add.Scalar", lambda b, x, y, alpha=1: x + _scaled(b, y, alpha))
pointwise("aten.sub.Tensor aten.sub.Scalar", lambda b, x, y, alpha=1: x - _scaled(b, y, alpha))
pointwise("aten.rsub.Tensor aten.rsub.Scalar", lambda b, x, y, alpha=1: y - _scaled(b, x, alpha))
pointwise("aten.mul.Tensor aten.mul.Scalar", lambda b, x, y: x * y)
pointwise("aten.div.Tensor aten.div.Scalar aten.true_divide.Tensor", _divide)
pointwise("aten.div.Tensor_mode aten.div.Scalar_mode", _divide, jumps=True)
for _name, _op in (("floor_divide.default", "floordiv"), ("remainder.Tensor", "remainder"),
                   ("remainder.Scalar", "remainder"), ("fmod.Tensor", "fmod"),
                   ("fmod.Scalar", "fmod")):  # fmt: skip
    pointwise(f"aten.{_name}", lambda b, x, y, _op=_op: b.call(_op, x, y), jumps=True)
pointwise("aten.pow.Tensor_Scalar aten.pow.Tensor_Tensor aten.pow.Scalar", _power)
pointwise("aten.square.default", lambda b, x: x * x)
pointwise("aten.neg.default", lambda b, x: -x)
pointwise("aten.reciprocal.default", lambda b, x: 1 / x)
pointwise("aten.addcmul.default", lambda b, x, y, z, value=1: x + _scaled(b, y * z, value))
pointwise("aten.lerp.Scalar aten.lerp.Tensor", lambda b, x, y, w: x + w * (y - x))
for _name in ("abs", "exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt", "sin", "cos",
              "tanh", "erf", "sigmoid", "isnan", "isinf", "log10", "erfc", "tan", "asin", "acos",
              "atan", "sinh", "cosh", "asinh", "acosh", "atanh"):  # fmt: skip
    pointwise(f"aten.{_name}.default", lambda b, x, _op=_name: b.call(_op, x))
for _name in ("floor", "ceil", "trunc", "round", "sign"):
    pointwise(f"aten.{_name}.default", lambda b, x, _op=_name: b.call(_op, x), jumps=True)
for _name in ("maximum", "minimum", "atan2", "hypot"):
    pointwise(f"aten.{_name}.default", lambda b, x, y, _op=_name: b.call(_op, x, y))
for _name, _op in (("fmax", "maximum"), ("fmin", "minimum")):
    pointwise(f"aten.{_name}.default", lambda b, x, y, _op=_op: _ignore_nan(b, _op, x, y))
pointwise("aten.ldexp.Tensor", lambda b, x, y: x * b.call("exp2", y))
pointwise("aten.copysign.Tensor aten.copysign.Scalar", lambda b, x, y: b.call("copysign", x, y))
pointwise("aten.signbit.default", lambda b, x: _signbit(b, x))
pointwise("aten.round.decimals", lambda b, x, decimals=0: _round(b, x, decimals), jumps=True)

# --- pointwise: activations -----------------------------------------------------------------


def _gelu(b: Any, x: Any, approximate: str = "none") -> Any:
    if approximate == "none":
        return 0.5 * x * (1 + b.erf(x * math.sqrt(0.5)))
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))
    return 0.5 * x * (1 + b.tanh(inner))


def _clamp(b: Any, x: Any, low: Any = None, high: Any = None) -> Any:
    x = x if low is None else b.call("maximum", x, low)
    return x if high is None else b.call("minimum", x, high)


def _softplus(b: Any, x: Any, beta: float = 1, threshold: float = 20) -> Any:
    scaled = x * beta
    return b.where(scaled > threshold, x, b.call("log1p", b.exp(scaled)) / beta)


def _elu(b: Any, x: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Any:
    return b.where(x > 0, x * scale, b.call("expm1", x * input_scale) * (alpha * scale))


pointwise("aten.gelu.default", _gelu)
pointwise("aten.relu.default", lambda b, x: b.call("maximum", x, 0))
pointwise("aten.relu6.default", lambda b, x: _clamp(b, x, 0, 6))
pointwise("aten.silu.default", lambda b, x: x * b.sigmoid(x))
pointwise("aten.mish.default", lambda b, x: x * b.tanh(_softplus(b, x)))
pointwise("aten.softplus.default", _softplus)
pointwise("aten.elu.default", _elu)
pointwise("aten.leaky_relu.default", lambda b, x, slope=0.01: b.where(x > 0, x, x * slope))
pointwise("aten.hardtanh.default", lambda b, x, low=-1, high=1: _clamp(b, x, low, high))
pointwise("aten.hardsigmoid.default", lambda b, x: _clamp(b, x + 3, 0, 6) / 6)
pointwise("aten.hardswish.default", lambda b, x: x * _clamp(b, x + 3, 0, 6) / 6)
pointwise("aten.clamp.default aten.clamp.Tensor", _clamp)
pointwise("aten.clamp_min.default aten.clamp_min.Tensor", lambda b, x, low: _clamp(b, x, low))
pointwise("aten.clamp_max.default aten.clamp_max.Tensor", lambda b, x, hi: _clamp(b, x, None, hi))

# --- pointwise: comparisons, logic, selection, conversion -----------------------------------

for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    pointwise(
        f"aten.{_name}.Tensor aten.{_name}.Scalar", lambda b, x, y, _op=_name: b.call(_op, x, y)
    )
for _name in ("and", "or", "xor"):
    pointwise(
        f"aten.bitwise_{_name}.Tensor aten.bitwise_{_name}.Scalar aten.__{_name}__.Tensor",
        lambda b, x, y, _op=_name: b.call(_op, x, y),
    )
    pointwise(
        f"aten.logical_{_name}.default",
        lambda b, x, y, _op=_name: b.call(_op, b.truth(x), b.truth(y)),
    )
for _name, _op in (("left", "shl"), ("right", "shr")):
    pointwise(
        f"aten.bitwise_{_name}_shift.Tensor aten.bitwise_{_name}_shift.Tensor_Scalar "
        f"aten.bitwise_{_name}_shift.Scalar_Tensor",
        lambda b, x, y, _op=_op: b.call(_op, x, y),
    )
pointwise("aten.bitwise_not.default", lambda b, x: b.call("not", x))
pointwise("aten.logical_not.default", lambda b, x: b.call("not", b.truth(x)))
pointwise("aten.where.self aten.where.ScalarOther", lambda b, c, x, y: b.where(c, x, y), as_is=(0,))
pointwise(
    "aten.masked_fill.Scalar aten.masked_fill.Tensor",
    lambda b, x, mask, value: b.where(mask, value, x),
    as_is=(1,),
)
pointwise("aten._to_copy.default aten.clone.default", lambda b, x, **_: x)
