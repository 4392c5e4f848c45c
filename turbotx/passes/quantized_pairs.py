"""Quantized pairs: products of PyTorch's PT2E quantiser become products of int8.

In: a graph whose `linear`s take what is quantised and dequantised again, by numbers that the
quantiser has found, and an int8 weight with a scale a channel. Out: the same product of int8, with
those numbers in the scales of its columns and, where zero is not in the middle, in its bias::

    linear(dequantize_per_tensor(quantize_per_tensor(x, s, z, ..), s, z, ..),
           dequantize_per_channel(w, t, 0, ..), b)
        ->  quantized_linear(quantize_affine(x, 1 / s, z - 128, ..), w, b + .., s t, None, float32)

Other pairs stay as they are, and PyTorch runs them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.quantized_ops import (
    if_zeros,
    quantize_affine,
    quantize_affine_by,
    quantized_linear,
)
from turbotx.passes.linear import is_weight

aten = torch.ops.aten
MOST = (2**31 - 1) // 128**2
"""How many products of two int8 numbers, -128 among both, a sum in int32 holds."""


def has_pairs(graph: fx.Graph) -> bool:
    """Return whether a graph has ops of PyTorch's quantiser."""
    return any(str(n.target).startswith("quantized_decomposed.") for n in graph.nodes)


def use_int8_pairs(graph: fx.Graph) -> None:
    """Write every product of such pairs as one of int8."""
    for node in list(graph.nodes):
        if g.is_call(node, aten.linear.default) and _fits(node):
            _use_int8(node)


def _is(node: Any, name: str) -> bool:
    # By name: the ops are registered where PyTorch's quantiser is imported.
    return (
        isinstance(node, fx.Node)
        and node.op == "call_function"
        and str(node.target) == f"quantized_decomposed.{name}"
        and not node.kwargs
    )


def _fits(node: fx.Node) -> bool:
    x, weight = g.operand(node, 0), g.operand(node, 1)
    kind = "tensor" if _is(x, "dequantize_per_tensor.tensor") else "default"
    if not _is(x, f"dequantize_per_tensor.{kind}"):
        return False
    rows: Any = x.args[0]
    if not _is(rows, f"quantize_per_tensor.{kind}") or rows.args[1:] != x.args[1:]:
        return False
    if not _is(weight, "dequantize_per_channel.default") or weight.args[3] != 0:
        return False
    whole, _, shift = weight.args[:3]
    if not is_weight(whole) or g.dtype(g.operand(weight, 0)) is not torch.int8:
        return False
    shape = g.shape(g.operand(weight, 0))
    narrow = rows.args[5] in (torch.uint8, torch.int8)
    sizes = len(shape) == 2 and all(e.is_Integer and e > 0 for e in shape) and shape[1] <= MOST
    taken = (torch.float32, torch.bfloat16, torch.float16)
    floats = g.dtype(node) is torch.float32 and g.dtype(g.operand(rows, 0)) in taken
    return bool(narrow and sizes and floats and _is_zero(shift))


def _is_zero(shift: Any) -> bool:
    """Return whether zero points of a weight are all zero now; `_columns` asks later on."""
    if shift is None:
        return True
    if shift.op != "get_attr":
        return False
    value: Any = shift.graph.owning_module
    for part in str(shift.target).split("."):
        value = getattr(value, part)
    return not bool(value.any())


def _use_int8(node: fx.Node) -> None:
    weight, rows = g.operand(node, 1), g.operand(g.operand(node, 0), 0)
    given: Any = rows.args
    with node.graph.inserting_before(node):
        if isinstance(given[1], fx.Node):
            made = _by_tensors(node, weight, *given)
        else:
            made = _by_numbers(node, weight, *given)
        g.replace(node, made)


def _by_numbers(
    node: fx.Node, weight: fx.Node, x: fx.Node, step: float, zero: int, low: int, high: int,
    dtype: torch.dtype,
) -> fx.Node:  # fmt: skip
    middle, bias = _middle(dtype), g.optional(node, 2)
    range_ = zero - middle, low - middle, high - middle
    narrow = g.emit(node, quantize_affine, x, 1.0 / step, *range_)
    scale = g.emit(node, aten.mul.Tensor, _columns(node, weight), step)
    if zero != middle:
        moved = g.emit(node, aten.mul.Tensor, _sums(node, weight), float(middle - zero))
        moved = g.emit(node, aten.mul.Tensor, moved, scale)
        bias = moved if bias is None else g.emit(node, aten.add.Tensor, moved, bias)
    return _product(node, narrow, weight, bias, scale)


def _by_tensors(
    node: fx.Node, weight: fx.Node, x: fx.Node, step: fx.Node, zero: fx.Node, low: int, high: int,
    dtype: torch.dtype,
) -> fx.Node:  # fmt: skip
    """As `_by_numbers` where every call finds them: what they change follows the product."""
    middle, bias = _middle(dtype), g.optional(node, 2)
    narrow = g.emit(node, quantize_affine_by, x, step, zero, middle, low - middle, high - middle)
    scale = _columns(node, weight)
    made = _product(node, narrow, weight, None, scale)
    zeros = g.emit(node, aten._to_copy.default, zero, dtype=torch.float32)
    moved = g.emit(node, aten.mul.Tensor, _sums(node, weight), scale)
    moved = g.emit(node, aten.mul.Tensor, moved, g.emit(node, aten.rsub.Scalar, zeros, middle))
    made = g.emit(node, aten.add.Tensor, made, moved)
    steps = g.emit(node, aten._to_copy.default, step, dtype=torch.float32)
    made = g.emit(node, aten.mul.Tensor, made, steps)
    return made if bias is None else g.emit(node, aten.add.Tensor, made, bias)


def _middle(dtype: torch.dtype) -> int:
    return 128 if dtype is torch.uint8 else 0


def _columns(node: fx.Node, weight: fx.Node) -> fx.Node:
    """Return the scales of a weight's channels, as long as their zero points are what they were
    when this was compiled."""
    scale, shift = g.operand(weight, 1), g.optional(weight, 2)
    return scale if shift is None else g.emit(node, if_zeros, scale, shift)


def _sums(node: fx.Node, weight: fx.Node) -> fx.Node:
    total = g.emit(node, aten.sum.dim_IntList, g.operand(weight, 0), [1])
    return g.emit(node, aten._to_copy.default, total, dtype=torch.float32)


def _product(
    node: fx.Node, narrow: fx.Node, weight: fx.Node, bias: fx.Node | None, scale: fx.Node
) -> fx.Node:
    args = (narrow, g.operand(weight, 0), bias, scale, None, torch.float32)
    return g.emit(node, quantized_linear, *args)
