"""The op table: one row per ATen op, saying what its element at an index is.

In: an ATen overload. Out: its row, which `kernels.lower` calls to pull one element of the op's
result. A pointwise row is a function of its arguments' elements; an indexed row also sees the
index, and may pull its inputs anywhere, or reduce over them. Adding an op is adding a row::

    pointwise("aten.silu.default", "float", lambda m, x: x * m.sigmoid(x))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from turbotx import graph as g
from turbotx.sizes import ZERO, Expr, product

aten = torch.ops.aten


@dataclass(frozen=True)
class Row:
    """One op: `kind` is "pointwise" or "indexed"; `as_is` are arguments that are not promoted.

    A pointwise `rule` takes (machine, *arguments) where tensors are elements in the compute
    dtype; an indexed one takes (machine, node, index).
    """

    overload: str
    kind: str
    rule: Callable[..., Any]
    as_is: tuple[int, ...] = ()
    reduces: bool = False


OPS: dict[Any, Row] = {}


def _resolve(overload: str) -> Any | None:
    namespace, packet, name = overload.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet, None), name, None)


def pointwise(overloads: str, rule: Callable[..., Any], as_is: tuple[int, ...] = ()) -> None:
    """Add a row for each of the space-separated overloads that this torch has."""
    for overload in overloads.split():
        target = _resolve(overload)
        if target is not None:
            OPS[target] = Row(overload, "pointwise", rule, as_is)


def indexed(overloads: str, rule: Callable[..., Any], reduces: bool = False) -> None:
    """Add a row whose rule sees the node and the index."""
    for overload in overloads.split():
        target = _resolve(overload)
        if target is not None:
            OPS[target] = Row(overload, "indexed", rule, reduces=reduces)


# --- pointwise: arithmetic ------------------------------------------------------------------


def _scaled(m: Any, y: Any, alpha: Any) -> Any:
    return y if alpha == 1 else y * alpha


def _divide(m: Any, x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is None:
        return x / y
    return m.call("floordiv" if rounding_mode == "floor" else "truncdiv", x, y)


def _power(m: Any, x: Any, y: Any) -> Any:
    """Small constant exponents are products and roots, as PyTorch computes them."""
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


pointwise("aten.add.Tensor aten.add.Scalar", lambda m, x, y, alpha=1: x + _scaled(m, y, alpha))
pointwise("aten.sub.Tensor aten.sub.Scalar", lambda m, x, y, alpha=1: x - _scaled(m, y, alpha))
pointwise("aten.rsub.Tensor aten.rsub.Scalar", lambda m, x, y, alpha=1: y - _scaled(m, x, alpha))
pointwise("aten.mul.Tensor aten.mul.Scalar", lambda m, x, y: x * y)
pointwise("aten.div.Tensor aten.div.Scalar aten.true_divide.Tensor", _divide)
pointwise("aten.div.Tensor_mode aten.div.Scalar_mode", _divide)
pointwise("aten.floor_divide.default", lambda m, x, y: m.call("floordiv", x, y))
pointwise("aten.remainder.Tensor aten.remainder.Scalar", lambda m, x, y: m.call("remainder", x, y))
pointwise("aten.fmod.Tensor aten.fmod.Scalar", lambda m, x, y: m.call("fmod", x, y))
pointwise("aten.pow.Tensor_Scalar aten.pow.Tensor_Tensor aten.pow.Scalar", _power)
pointwise("aten.square.default", lambda m, x: x * x)
pointwise("aten.neg.default", lambda m, x: -x)
pointwise("aten.reciprocal.default", lambda m, x: 1 / x)
pointwise("aten.addcmul.default", lambda m, x, a, b, value=1: x + _scaled(m, a * b, value))
pointwise("aten.lerp.Scalar aten.lerp.Tensor", lambda m, x, y, w: x + w * (y - x))
for _name in ("abs", "exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt", "sin", "cos",
              "tanh", "erf", "sigmoid", "floor", "ceil", "trunc", "round", "sign", "isnan",
              "isinf"):  # fmt: skip
    pointwise(f"aten.{_name}.default", lambda m, x, _op=_name: m.call(_op, x))
for _name in ("maximum", "minimum"):
    pointwise(f"aten.{_name}.default", lambda m, x, y, _op=_name: m.call(_op, x, y))

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

# --- pointwise: comparisons, logic, choice, conversion --------------------------------------

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
pointwise("aten.bitwise_not.default", lambda m, x: m.call("not", x))
pointwise("aten.logical_not.default", lambda m, x: m.call("not", m.truth(x)))
pointwise("aten.where.self aten.where.ScalarOther", lambda m, c, x, y: m.where(c, x, y), as_is=(0,))
pointwise(
    "aten.masked_fill.Scalar aten.masked_fill.Tensor",
    lambda m, x, mask, value: m.where(mask, value, x),
    as_is=(1,),
)
pointwise("aten._to_copy.default aten.clone.default", lambda m, x, **_: x)


# --- creation -------------------------------------------------------------------------------


def _arange(m: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    start, step = g.argument(node, "start", 0), g.argument(node, "step", 1)
    numbers = [g.fake(v) for v in (start, step)]
    if all(not isinstance(v, float) for v in numbers):
        position = g.size(start) + g.size(step) * index[0]
        return m.cast(m.index(position.expand()), g.dtype(node))
    return m.constant(start, g.dtype(node)) + m.cast(m.index(index[0]), g.dtype(node)) * step


def _full(m: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    value = g.argument(node, "fill_value")
    if isinstance(value, (bool, int, float)):
        return m.constant(value, g.dtype(node))
    return m.cast(m.index(g.size(value)), g.dtype(node))


indexed("aten.arange.start_step", _arange)
indexed("aten.full.default aten.full_like.default aten.new_full.default", _full)
for _name, _value in (("zeros", 0), ("ones", 1)):
    indexed(
        f"aten.{_name}.default aten.{_name}_like.default aten.new_{_name}.default",
        lambda m, node, index, _value=_value: m.constant(_value, g.dtype(node)),
    )
indexed(
    "aten.scalar_tensor.default",
    lambda m, node, index: m.constant(node.args[0], g.dtype(node)),
)

# --- indexing -------------------------------------------------------------------------------


def _embedding(m: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    table, ids = node.args[:2]
    row = m.element(ids, index[:-1])
    return m.element(table, (m.position(row, g.shape(table)[0]), index[-1]))


def _gather(m: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    source, dim, at = node.args[:3]
    d = dim % len(index)
    place = m.position(m.element(at, index), g.shape(source)[d])
    return m.element(source, (*index[:d], place, *index[d + 1 :]))


def _index_select(m: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    source, dim, at = node.args[:3]
    d = dim % len(index)
    place = m.position(m.element(at, (index[d],)), g.shape(source)[d])
    return m.element(source, (*index[:d], place, *index[d + 1 :]))


def _index(m: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    """Advanced indexing: the index tensors' broadcast dims stand where the first of them stands,
    or first of all when a slice separates them."""
    source, tensors = node.args[:2]
    given = [d for d, t in enumerate(tensors) if t is not None]
    rank = max(len(g.shape(tensors[d])) for d in given)
    adjacent = given == list(range(given[0], given[-1] + 1))
    first = given[0] if adjacent else 0
    shared, rest = index[first : first + rank], index[:first] + index[first + rank :]
    kept = iter(rest)
    place: list[Any] = []
    for d, extent in enumerate(g.shape(source)):
        at = tensors[d] if d < len(tensors) else None
        if at is None:
            place.append(next(kept))
            continue
        value = m.element(at, m.broadcast(at, shared))
        place.append(m.position(value, extent, wrap=True))
    return m.element(source, tuple(place))


def _cat(m: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    parts = [p for p in node.args[0] if g.shape(p) != (0,)]
    d = g.argument(node, "dim") % len(index)
    start, result = ZERO, None
    pieces = []
    for part in parts:
        pieces.append((part, start))
        start = (start + g.shape(part)[d]).expand()
    for part, begin in reversed(pieces):
        local = (*index[:d], (index[d] - begin).expand(), *index[d + 1 :])
        inside = m.index(index[d]) >= m.index(begin)
        end = m.index(index[d]) < m.index((begin + g.shape(part)[d]).expand())
        with m.masked(m.call("and", inside, end)) as mask:
            value = m.cast(m.element(part, local), g.dtype(node))
        result = value if result is None else m.where(mask, value, result)
    return result


def _pad(m: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    source, pads = node.args[:2]
    value = node.args[2] if len(node.args) > 2 else 0
    place, mask = list(index), m.constant(True, torch.bool)
    for k in range(len(pads) // 2):
        d = len(index) - 1 - k
        before, after = g.size(pads[2 * k]), g.size(pads[2 * k + 1])
        place[d] = (index[d] - before).expand()
        extent = g.shape(source)[d]
        if before != 0:
            mask = m.call("and", mask, m.index(place[d]) >= m.index(ZERO))
        if after != 0:
            mask = m.call("and", mask, m.index(place[d]) < m.index(extent))
    with m.masked(mask) as inside:
        element = m.element(source, tuple(place))
    return m.where(inside, element, m.constant(value, g.dtype(node)))


def _triangle(keep: str) -> Callable[..., Any]:
    def rule(m: Any, node: Any, index: tuple[Expr, ...]) -> Any:
        diagonal = node.args[1] if len(node.args) > 1 else 0
        kept = m.call(keep, m.index(index[-1] - index[-2]), m.index(g.size(diagonal)))
        return m.where(kept, m.element(node.args[0], index), m.constant(0, g.dtype(node)))

    return rule


indexed("aten.embedding.default", _embedding)
indexed("aten.gather.default", _gather)
indexed("aten.index_select.default", _index_select)
indexed("aten.index.Tensor", _index)
indexed("aten.cat.default", _cat)
indexed("aten.constant_pad_nd.default", _pad)
indexed("aten.tril.default", _triangle("le"))
indexed("aten.triu.default", _triangle("ge"))


# --- reductions -----------------------------------------------------------------------------


def _reduction(op: str, finish: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A row for `op` over the node's dims; `finish(m, node, value, count)` ends it."""

    def rule(m: Any, node: Any, index: tuple[Expr, ...]) -> Any:
        (value,), count = m.reduce_node(op, node, index)
        return value if finish is None else finish(m, node, value, count)

    return rule


def _variance(m: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    correction = g.argument(node, "correction")
    (_, m2), count = m.reduce_node("welford", node, index)
    degrees = count - m.constant(1 if correction is None else correction, count.dtype)
    return m2 / m.call("maximum", degrees, m.constant(0, count.dtype))


def _vector_norm(m: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    order = g.argument(node, "ord")
    if order == 2:
        (total,), _ = m.reduce_node("sum", node, index, before=lambda x: x * x)
        return m.call("sqrt", total)
    if order == 1:
        return m.reduce_node("sum", node, index, before=lambda x: m.call("abs", x))[0][0]
    if abs(order) == math.inf:
        op = "max" if order > 0 else "min"
        return m.reduce_node(op, node, index, before=lambda x: m.call("abs", x))[0][0]
    power = m.constant(order, m.compute_dtype(node))
    raised = m.reduce_node(
        "sum", node, index, before=lambda x: m.call("pow", m.call("abs", x), power)
    )[0][0]
    return m.call("pow", raised, m.constant(1 / order, raised.dtype))


def _softmax(log: bool, safe: bool = False) -> Callable[..., Any]:
    def rule(m: Any, node: Any, index: tuple[Expr, ...]) -> Any:
        x = node.args[0]
        d = node.args[1] % max(len(index), 1)
        (largest, total), _ = m.reduce_dims("softmax", x, (d,), index, m.compute_dtype(node))
        here = m.cast(m.element(x, index), m.compute_dtype(node)) - largest
        if log:
            return here - m.call("log", total)
        share = m.exp(here) / total
        if not safe:
            return share
        hidden = m.call("eq", largest, m.constant(-math.inf, largest.dtype))
        return m.where(hidden, m.constant(0, share.dtype), share)

    return rule


def _normalize(m: Any, node: Any, index: tuple[Expr, ...], mean: Any, var: Any, eps: Any) -> Any:
    x = m.cast(m.element(node.args[0], index), m.compute_dtype(node))
    x = x if mean is None else x - mean
    return x * m.call("rsqrt", var + eps)


def _affine(m: Any, value: Any, weight: Any, bias: Any, at: tuple[Expr, ...]) -> Any:
    if weight is not None:
        value = value * m.cast(m.element(weight, at), value.dtype)
    return value if bias is None else value + m.cast(m.element(bias, at), value.dtype)


def _layer_norm(m: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    x, shape = node.args[:2]
    weight, bias, eps = (g.argument(node, n) for n in ("weight", "bias", "eps"))
    dims = tuple(range(len(index) - len(shape), len(index)))
    (mean, m2), count = m.reduce_dims("welford", x, dims, index, m.compute_dtype(node))
    value = _normalize(m, node, index, mean, m2 / count, eps)
    return _affine(m, value, weight, bias, index[dims[0] :])


def _rms_norm(m: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    x, shape = node.args[:2]
    weight, eps = g.argument(node, "weight"), g.argument(node, "eps")
    eps = torch.finfo(g.dtype(x)).eps if eps is None else eps
    dims = tuple(range(len(index) - len(shape), len(index)))
    (total,), count = m.reduce_dims(
        "sum", x, dims, index, m.compute_dtype(node), before=lambda v: v * v
    )
    value = _normalize(m, node, index, None, total / count, eps)
    return _affine(m, value, weight, None, index[dims[0] :])


def _group_norm(m: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    """Statistics over a group of channels and all places, by looking at x as (N, G, C/G, …)."""
    x, groups = node.args[:2]
    weight, bias, eps = (g.argument(node, n) for n in ("weight", "bias", "eps"))
    shape = g.shape(x)
    within = shape[1] / groups
    group, _ = m.split(index[1], within)
    extents = (within, *shape[2:])

    def pull(inner: tuple[Expr, ...]) -> Any:
        channel = (group * within + inner[0]).expand()
        element = m.element(x, (index[0], channel, *inner[1:]))
        return m.cast(element, m.compute_dtype(node))

    mean, m2 = m.reduce("welford", pull, extents, (index[0], group), node)
    count = m.cast(m.index(product(extents)), mean.dtype)
    value = _normalize(m, node, index, mean, m2 / count, eps)
    return _affine(m, value, weight, bias, (index[1],))


indexed("aten.sum.default aten.sum.dim_IntList", _reduction("sum"), True)
indexed(
    "aten.mean.default aten.mean.dim",
    _reduction("sum", lambda m, node, value, count: value / count),
    True,
)
indexed("aten.amax.default", _reduction("max"), True)
indexed("aten.amin.default", _reduction("min"), True)
indexed("aten.max.default aten.min.default", lambda m, node, index: m.reduce_node(
    "max" if "max" in str(node.target) else "min", node, index)[0][0], True)  # fmt: skip
indexed("aten.prod.default aten.prod.dim_int", _reduction("prod"), True)
indexed("aten.any.default aten.any.dim aten.any.dims", _reduction("any"), True)
indexed("aten.all.default aten.all.dim aten.all.dims", _reduction("all"), True)
indexed("aten.var.correction aten.var.dim", _variance, True)
indexed("aten.std.correction aten.std.dim", lambda m, node, index: m.call(
    "sqrt", _variance(m, node, index)), True)  # fmt: skip
indexed("aten.linalg_vector_norm.default", _vector_norm, True)
indexed("aten.softmax.int aten._softmax.default", _softmax(log=False), True)
indexed("aten.log_softmax.int aten._log_softmax.default", _softmax(log=True), True)
indexed("aten._safe_softmax.default", _softmax(log=False, safe=True), True)
indexed("aten.layer_norm.default", _layer_norm, True)
indexed("aten.rms_norm.default", _rms_norm, True)
indexed("aten.group_norm.default", _group_norm, True)


def is_computed(node: Any) -> bool:
    """Tell whether the table has a row for this fx node, so that a kernel can compute it."""
    return g.is_tensor(node) and node.op == "call_function" and node.target in OPS
