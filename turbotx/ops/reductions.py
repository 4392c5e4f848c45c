"""Rows of the op table that reduce: sums, norms, softmax and normalizations.

In: a node and an index into its result. Out: the element there. Every reduction is single-pass,
with its statistics carried together, for example::

    layer_norm(x)[row, col]  ->  mean, m2 = welford(x[row, :]); (x - mean) * rsqrt(m2 / n + eps)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._sympy.functions import FloorDiv

from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import ZERO, Expr, divide, expr, product
from turbotx.ops.table import indexed

# --- reductions -----------------------------------------------------------------------------


def _reduction(op: str, finish: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Return a rule for `op` over the node's dims; `finish(b, node, value, count)` postprocesses
    it."""

    def rule(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
        (value,), count = b.reduce_node(op, node, index)
        return value if finish is None else finish(b, node, value, count)

    return rule


def _variance(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    names = {a.name for a in node.target._schema.arguments}
    unbiased = "unbiased" in names and g.argument(node, "unbiased") is False
    correction = g.argument(node, "correction") if "correction" in names else 1 - unbiased
    (_, m2), count = b.reduce_node("welford", node, index)
    degrees = count - b.constant(1 if correction is None else correction, count.dtype)
    return m2 / b.call("maximum", degrees, b.constant(0, count.dtype))


def _vector_norm(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    order = g.argument(node, "ord")
    if order == 2:
        (total,), _ = b.reduce_node("sum", node, index, before=lambda x: x * x)
        return b.call("sqrt", total)
    if order == 1:
        return b.reduce_node("sum", node, index, before=lambda x: b.call("abs", x))[0][0]
    if order == 0:
        return b.reduce_node(
            "sum", node, index, before=lambda x: b.cast(b.truth(x), b.compute_dtype(node))
        )[0][0]
    if abs(order) == math.inf:
        op = "max" if order > 0 else "min"
        return b.reduce_node(op, node, index, before=lambda x: b.call("abs", x))[0][0]
    power = b.constant(order, b.compute_dtype(node))
    raised = b.reduce_node(
        "sum", node, index, before=lambda x: b.call("pow", b.call("abs", x), power)
    )[0][0]
    return b.call("pow", raised, b.constant(1 / order, raised.dtype))


def _position_of(op: str) -> Callable[..., Any]:
    """Lower argmax and argmin: the first index of the extreme; NaN takes precedence."""

    def rule(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
        x = node.args[0]
        shape, d = g.shape(x), g.argument(node, "dim")
        if not shape:
            return b.constant(0, torch.int64)
        if d is not None and g.argument(node, "keepdim") is False:
            index = (*index[: d % len(shape)], ZERO, *index[d % len(shape) :])
        dims = tuple(range(len(shape))) if d is None else (d % len(shape),)
        index = tuple(ZERO for _ in shape) if d is None else index
        dtype = b.compute_dtype(x)

        def held(value: Any) -> Any:
            return b.rounded(value, g.dtype(x))

        (extreme,), _ = b.reduce_dims(op, x, dims, index, dtype, before=held)

        def place(inner: tuple[Expr, ...]) -> Any:
            here, flat = list(index), ZERO
            for dim, i in zip(dims, inner, strict=True):
                here[dim], flat = i, flat * shape[dim] + i
            value = b.cast(held(b.element(x, tuple(here))), dtype)
            found = b.call("eq", value, extreme)
            if value.is_float:
                found = b.call("or", found, b.call("isnan", value))
            last = b.index(product([shape[dim] for dim in dims]))
            return b.where(found, b.index(flat.expand()), last)

        kept = [i for dim, i in enumerate(index) if dim not in dims]
        return b.reduce("min", place, [shape[dim] for dim in dims], kept, node)[0]

    return rule


def _running(op: str) -> Callable[..., Any]:
    def rule(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
        x, dtype = node.args[0], b.compute_dtype(node)
        if not index:
            return b.cast(b.element(x, ()), dtype)
        return b.scan(op, x, node.args[1] % len(index), index, dtype)

    return rule


def _softmax(log: bool, safe: bool = False) -> Callable[..., Any]:
    def rule(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
        x = node.args[0]
        dims = (node.args[1] % len(index),) if index else ()
        (largest, total), _ = b.reduce_dims("softmax", x, dims, index, b.compute_dtype(node))
        here = b.cast(b.element(x, index), b.compute_dtype(node)) - largest
        if log:
            return here - b.call("log", total)
        share = b.exp(here) / total
        if not safe:
            return share
        hidden = b.call("eq", largest, b.constant(-math.inf, largest.dtype))
        return b.where(hidden, b.constant(0, share.dtype), share)

    return rule


def _normalize(b: Any, node: Any, index: tuple[Expr, ...], mean: Any, var: Any, eps: Any) -> Any:
    x = b.cast(b.element(node.args[0], index), b.compute_dtype(node))
    x = x if mean is None else x - mean
    return x * b.call("rsqrt", var + eps)


def _affine(b: Any, value: Any, weight: Any, bias: Any, at: tuple[Expr, ...]) -> Any:
    by, more = (p if p is None else b.cast(b.element(p, at), value.dtype) for p in (weight, bias))
    if by is not None and more is not None:
        return b.call("fma", value, by, more)  # rounded once, as PyTorch's norms do it
    value = value if by is None else value * by
    return value if more is None else value + more


def _layer_norm(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    x, shape = node.args[:2]
    weight, bias, eps = (g.argument(node, n) for n in ("weight", "bias", "eps"))
    dims = tuple(range(len(index) - len(shape), len(index)))
    (mean, m2), count = b.reduce_dims("welford", x, dims, index, b.compute_dtype(node))
    value = _normalize(b, node, index, mean, m2 / count, eps)
    return _affine(b, value, weight, bias, index[dims[0] :])


def _rms_norm(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    x, shape = node.args[:2]
    weight, eps = g.argument(node, "weight"), g.argument(node, "eps")
    eps = torch.finfo(b.compute_dtype(x)).eps if eps is None else eps
    dims = tuple(range(len(index) - len(shape), len(index)))
    (total,), count = b.reduce_dims(
        "sum", x, dims, index, b.compute_dtype(node), before=lambda v: v * v
    )
    value = _normalize(b, node, index, None, total / count, eps)
    return _affine(b, value, weight, None, index[dims[0] :])


def _group_norm(b: Any, node: Any, index: tuple[Expr, ...]) -> Any:
    """Lower group_norm: statistics over a group of channels and all positions, x as (N, G, C/G,
    …)."""
    x, groups = node.args[:2]
    weight, bias, eps = (g.argument(node, n) for n in ("weight", "bias", "eps"))
    shape = g.shape(x)
    within = divide(shape[1], expr(groups)) or FloorDiv(shape[1], groups)
    group, _ = b.split(index[1], within)
    extents = (within, *shape[2:])

    def pull(inner: tuple[Expr, ...]) -> Any:
        channel = (group * within + inner[0]).expand()
        element = b.element(x, (index[0], channel, *inner[1:]))
        return b.cast(element, b.compute_dtype(node))

    mean, m2 = b.reduce("welford", pull, extents, (index[0], group), node)
    count = b.cast(b.index(product(extents)), mean.dtype)
    value = _normalize(b, node, index, mean, m2 / count, eps)
    return _affine(b, value, weight, bias, (index[1],))


indexed("aten.sum.default aten.sum.dim_IntList", _reduction("sum"), True)
indexed(
    "aten.mean.default aten.mean.dim",
    _reduction("sum", lambda b, node, value, count: value / count),
    True,
)
indexed("aten.amax.default", _reduction("max"), True)
indexed("aten.amin.default", _reduction("min"), True)
indexed("aten.max.default aten.min.default", lambda b, node, index: b.reduce_node(
    "max" if "max" in str(node.target) else "min", node, index)[0][0], True)  # fmt: skip
indexed("aten.prod.default aten.prod.dim_int", _reduction("prod"), True)
indexed("aten.any.default aten.any.dim aten.any.dims", _reduction("any"), True)
indexed("aten.all.default aten.all.dim aten.all.dims", _reduction("all"), True)
indexed("aten.argmax.default", _position_of("max"), True)
indexed("aten.argmin.default", _position_of("min"), True)
indexed("aten.cumsum.default", _running("sum"), True)
indexed("aten.cumprod.default", _running("prod"), True)
indexed("aten.var.correction aten.var.dim", _variance, True)
indexed("aten.std.correction aten.std.dim", lambda b, node, index: b.call(
    "sqrt", _variance(b, node, index)), True)  # fmt: skip
indexed("aten.linalg_vector_norm.default", _vector_norm, True)
indexed("aten.softmax.int aten._softmax.default", _softmax(log=False), True)
indexed("aten.log_softmax.int aten._log_softmax.default", _softmax(log=True), True)
indexed("aten._safe_softmax.default", _softmax(log=False, safe=True), True)
indexed("aten.layer_norm.default", _layer_norm, True)
indexed("aten.rms_norm.default", _rms_norm, True)
indexed("aten.group_norm.default", _group_norm, True)
