"""Rows of the op table that work elementwise.

In: elements of the arguments, in the compute dtype. Out: the result's element, for example::

    pointwise("aten.silu.default", lambda m, x: x * m.sigmoid(x))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from turbotx.ops.table import pointwise

# --- pointwise: arithmetic ------------------------------------------------------------------


def _scaled(m: Any, y: Any, alpha: Any) -> Any:
    return y if alpha == 1 else y * alpha


def _divide(m: Any, x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is None:
        return x / y
    return m.call("floordiv" if rounding_mode == "floor" else "truncdiv", x, y)


def _power(m: Any, x: Any, y: Any) -> Any:
    """Lower pow; small constant exponents become products and roots, as in PyTorch."""
    whole: dict[Any, Callable[[], Any]] = {
        1: lambda: x,
        2: lambda: x * x,
        3: lambda: x * x * x,
        0.5: lambda: m.call("sqrt", x),
        -0.5: lambda: m.call("rsqrt", x),
        -1: lambda: 1 / x,
        -2: lambda: 1 / (x * x),
    }
    value = m.constant_of(y)
    if x.is_float and value in whole:
        return whole[value]()
    if not x.is_float and value in (1, 2, 3):
        return whole[value]()
    return m.call("pow", x, y)


def _ignore_nan(m: Any, op: str, x: Any, y: Any) -> Any:
    larger = m.where(m.call("isnan", y), x, m.call(op, x, y))
    return m.where(m.call("isnan", x), y, larger)


def _signbit(m: Any, x: Any) -> Any:
    return m.call("copysign", m.constant(1, x.dtype), x) < 0 if x.is_float else x < 0


def _round(m: Any, x: Any, decimals: int) -> Any:
    """Lower round with decimals: scale by a power of ten and back, as PyTorch does."""
    scale = m.constant(10.0 ** abs(decimals), x.dtype)
    if decimals >= 0:
        return m.call("round", x * scale) / scale
    return m.call("round", x / scale) * scale


pointwise("aten.add.Tensor aten.add.Scalar", lambda m, x, y, alpha=1: x + _scaled(m, y, alpha))
pointwise("aten.sub.Tensor aten.sub.Scalar", lambda m, x, y, alpha=1: x - _scaled(m, y, alpha))
pointwise("aten.rsub.Tensor aten.rsub.Scalar", lambda m, x, y, alpha=1: y - _scaled(m, x, alpha))
pointwise("aten.mul.Tensor aten.mul.Scalar", lambda m, x, y: x * y)
pointwise("aten.div.Tensor aten.div.Scalar aten.true_divide.Tensor", _divide)
pointwise("aten.div.Tensor_mode aten.div.Scalar_mode", _divide, jumps=True)
for _name, _op in (("floor_divide.default", "floordiv"), ("remainder.Tensor", "remainder"),
                   ("remainder.Scalar", "remainder"), ("fmod.Tensor", "fmod"),
                   ("fmod.Scalar", "fmod")):  # fmt: skip
    pointwise(f"aten.{_name}", lambda m, x, y, _op=_op: m.call(_op, x, y), jumps=True)
pointwise("aten.pow.Tensor_Scalar aten.pow.Tensor_Tensor aten.pow.Scalar", _power)
pointwise("aten.square.default", lambda m, x: x * x)
pointwise("aten.neg.default", lambda m, x: -x)
pointwise("aten.reciprocal.default", lambda m, x: 1 / x)
pointwise("aten.addcmul.default", lambda m, x, a, b, value=1: x + _scaled(m, a * b, value))
pointwise("aten.lerp.Scalar aten.lerp.Tensor", lambda m, x, y, w: x + w * (y - x))
for _name in ("abs", "exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt", "sin", "cos",
              "tanh", "erf", "sigmoid", "isnan", "isinf", "log10", "erfc", "tan", "asin", "acos",
              "atan", "sinh", "cosh", "asinh", "acosh", "atanh"):  # fmt: skip
    pointwise(f"aten.{_name}.default", lambda m, x, _op=_name: m.call(_op, x))
for _name in ("floor", "ceil", "trunc", "round", "sign"):
    pointwise(f"aten.{_name}.default", lambda m, x, _op=_name: m.call(_op, x), jumps=True)
for _name in ("maximum", "minimum", "atan2", "hypot"):
    pointwise(f"aten.{_name}.default", lambda m, x, y, _op=_name: m.call(_op, x, y))
for _name, _op in (("fmax", "maximum"), ("fmin", "minimum")):
    pointwise(f"aten.{_name}.default", lambda m, x, y, _op=_op: _ignore_nan(m, _op, x, y))
pointwise("aten.ldexp.Tensor", lambda m, x, y: x * m.call("exp2", y))
pointwise("aten.copysign.Tensor aten.copysign.Scalar", lambda m, x, y: m.call("copysign", x, y))
pointwise("aten.signbit.default", lambda m, x: _signbit(m, x))
pointwise("aten.round.decimals", lambda m, x, decimals=0: _round(m, x, decimals), jumps=True)

# --- pointwise: activations -----------------------------------------------------------------


def _gelu(m: Any, x: Any, approximate: str = "none") -> Any:
    if approximate == "none":
        return 0.5 * x * (1 + m.erf(x * math.sqrt(0.5)))
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))
    return 0.5 * x * (1 + m.tanh(inner))


def _clamp(m: Any, x: Any, low: Any = None, high: Any = None) -> Any:
    x = x if low is None else m.call("maximum", x, low)
    return x if high is None else m.call("minimum", x, high)


def _softplus(m: Any, x: Any, beta: float = 1, threshold: float = 20) -> Any:
    scaled = x * beta
    return m.where(scaled > threshold, x, m.call("log1p", m.exp(scaled)) / beta)


def _elu(m: Any, x: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Any:
    return m.where(x > 0, x * scale, m.call("expm1", x * input_scale) * (alpha * scale))


pointwise("aten.gelu.default", _gelu)
pointwise("aten.relu.default", lambda m, x: m.call("maximum", x, 0))
pointwise("aten.relu6.default", lambda m, x: _clamp(m, x, 0, 6))
pointwise("aten.silu.default", lambda m, x: x * m.sigmoid(x))
pointwise("aten.mish.default", lambda m, x: x * m.tanh(_softplus(m, x)))
pointwise("aten.softplus.default", _softplus)
pointwise("aten.elu.default", _elu)
pointwise("aten.leaky_relu.default", lambda m, x, slope=0.01: m.where(x > 0, x, x * slope))
pointwise("aten.hardtanh.default", lambda m, x, low=-1, high=1: _clamp(m, x, low, high))
pointwise("aten.hardsigmoid.default", lambda m, x: _clamp(m, x + 3, 0, 6) / 6)
pointwise("aten.hardswish.default", lambda m, x: x * _clamp(m, x + 3, 0, 6) / 6)
pointwise("aten.clamp.default aten.clamp.Tensor", _clamp)
pointwise("aten.clamp_min.default aten.clamp_min.Tensor", lambda m, x, low: _clamp(m, x, low))
pointwise("aten.clamp_max.default aten.clamp_max.Tensor", lambda m, x, hi: _clamp(m, x, None, hi))

# --- pointwise: comparisons, logic, selection, conversion -----------------------------------

for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    pointwise(
        f"aten.{_name}.Tensor aten.{_name}.Scalar", lambda m, x, y, _op=_name: m.call(_op, x, y)
    )
for _name in ("and", "or", "xor"):
    pointwise(
        f"aten.bitwise_{_name}.Tensor aten.bitwise_{_name}.Scalar aten.__{_name}__.Tensor",
        lambda m, x, y, _op=_name: m.call(_op, x, y),
    )
    pointwise(
        f"aten.logical_{_name}.default",
        lambda m, x, y, _op=_name: m.call(_op, m.truth(x), m.truth(y)),
    )
for _name, _op in (("left", "shl"), ("right", "shr")):
    pointwise(
        f"aten.bitwise_{_name}_shift.Tensor aten.bitwise_{_name}_shift.Tensor_Scalar "
        f"aten.bitwise_{_name}_shift.Scalar_Tensor",
        lambda m, x, y, _op=_op: m.call(_op, x, y),
    )
pointwise("aten.bitwise_not.default", lambda m, x: m.call("not", x))
pointwise("aten.logical_not.default", lambda m, x: m.call("not", m.truth(x)))
pointwise("aten.where.self aten.where.ScalarOther", lambda m, c, x, y: m.where(c, x, y), as_is=(0,))
pointwise(
    "aten.masked_fill.Scalar aten.masked_fill.Tensor",
    lambda m, x, mask, value: m.where(mask, value, x),
    as_is=(1,),
)
pointwise("aten._to_copy.default aten.clone.default", lambda m, x, **_: x)
