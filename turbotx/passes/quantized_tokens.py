"""Quantised tokens: rows as int8, and products by int8 weights, written over one axis of tokens.

In: a packer and a node of `passes.quantize` with an operand over tokens. Out: the same op over
tokens: each row has its own scale, so that no token depends on another one, for example::

    row_scale(x (batch, seq, 384))  ->  row_scale(x (1, tokens, 384)), of (1, tokens, 1)
"""

from __future__ import annotations

from typing import Any

from torch import fx

from turbotx.ir.quantized_ops import (
    quantize_rows,
    quantized_linear,
    row_scale,
    weight_only_linear,
)
from turbotx.passes.packer import Packer, Rule
from turbotx.passes.token_rules import linear
from turbotx.passes.tokens import ByToken


def scale(p: Packer, node: fx.Node) -> ByToken:
    """Find each token's scale. Raises Refused where the row is one of tokens."""
    x = p.operand(node)
    p.apart(node, x, -1)
    return p.token(p.emit(node, row_scale, x.node, *node.args[1:]), (*x.dims[:-1], ()))


def narrow(p: Packer, node: fx.Node) -> ByToken:
    """Quantise each token's row by its own scale."""
    x, own = p.operand(node), p.operand(node, 1)
    return p.token(p.emit(node, quantize_rows, x.node, own.node, *node.args[2:]), x.dims)


def multiply(p: Packer, node: fx.Node) -> ByToken:
    """Multiply each token's row by an int8 weight, by its own scale where it is int8 already."""
    x, (_, *rest, own, dtype) = p.operand(node), node.args
    p.apart(node, x, -1)
    whole = [p.whole(a, "a weight", node) for a in rest]
    across: Any = None if own is None else p.operand(node, 4).node
    made = p.emit(node, quantized_linear, x.node, *whole, across, dtype)
    return p.token(made, p.fixed_dims(node, x.dims, len(x.dims) - 1))


QUANTIZED: dict[Any, Rule] = {
    row_scale: scale, quantize_rows: narrow, quantized_linear: multiply, weight_only_linear: linear,
}  # fmt: skip
