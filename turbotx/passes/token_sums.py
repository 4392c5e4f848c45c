"""Token sums: rewrites reductions over a sequence's tokens to use the bounds of sequences.

In: a reduction along the columns, a cumulative sum, a first token. Out: the same per sequence, no
longer over tokens. Refused if masked tokens would count. For example::

    sum(x * mask, 1) / sum(mask, 1)  ->  sequence_sum(x * mask, bounds) / sequence_sum(mask, bounds)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.packed_ops import sequence_cumsum, sequence_max, sequence_sum, sequence_token
from turbotx.ir.views import is_view
from turbotx.passes.packer import Packer, Rule
from turbotx.passes.tokens import ByToken, Refused

aten = torch.ops.aten
_BY_SEQUENCE: dict[Any, Any] = {
    aten.sum.dim_IntList: sequence_sum, aten.any.dim: sequence_max, aten.any.dims: sequence_max,
    aten.amax.default: sequence_max,
}  # fmt: skip

_NONNEGATIVE = frozenset({aten.relu.default, aten.abs.default, aten.exp.default,
                          aten.sigmoid.default})  # fmt: skip
_KEEPS_SIGN = frozenset({aten.log1p.default, aten.sqrt.default, aten._to_copy.default})


def take_token(p: Packer, node: fx.Node, x: ByToken, last: bool) -> fx.Node:
    """Return the first or last token of every sequence; that column is then kept even if it is
    masked."""
    p.to_end |= last
    p.from_start |= not last
    return _by_sequence(p, node, x, sequence_token, last)


def _by_sequence(p: Packer, node: fx.Node, x: ByToken, target: Any, *more: Any) -> fx.Node:
    """Return a call along the tokens, with its batch dim where the model has it."""
    b, s = x.b, x.s
    if x.dims[s] != ("s",) or b is None or x.dims[b] != ("b",):
        raise Refused(node, "is by sequence of tokens whose batch rows are not apart from them")
    first = [b, *(d for d in range(len(x.dims)) if d != b)]
    moved = x.node if b == 0 else p.emit(node, aten.permute.default, x.node, first)
    made = p.emit(node, target, moved, p.inputs["bounds"], s if b < s else s + 1, *more)
    place = b if b < s else b - 1
    if place == 0:
        return made
    back = [*range(1, place + 1), 0, *range(place + 1, len(x.dims) - 1)]
    return p.emit(node, aten.permute.default, made, back)


def reduce(p: Packer, node: fx.Node) -> Any:
    """Reduce along other dims than tokens, or along tokens per sequence if masked tokens do not
    count. Raises Refused otherwise."""
    x = p.operand(node)
    rank = len(x.dims)
    target: Any = node.target
    names = [a.name for a in target._schema.arguments]
    given = g.argument(node, "dim") if "dim" in names else None
    listed = [given] if isinstance(given, int) else given
    dims = [d % rank for d in listed] if listed else list(range(rank))
    held = {f for d in dims for f in x.dims[d] if isinstance(f, str)}
    if not held:
        keep = "keepdim" in names and bool(g.argument(node, "keepdim"))
        made = p.emit(node, node.target, x.node, *node.args[1:], **node.kwargs)
        left = [f if d not in dims else () for d, f in enumerate(x.dims) if keep or d not in dims]
        return p.token(made, tuple(left))
    if held != {"s"} or dims != [x.s] or node.target not in _BY_SEQUENCE:
        raise Refused(node, "makes one thing of several tokens, in a way that is not by sequence")
    _require_hidden_nothing(p, node)
    source = x.node
    if node.target in (aten.any.dim, aten.any.dims) and g.dtype(source) is not torch.bool:
        source = p.emit(node, aten.ne.Scalar, source, 0)
    if node.target in (aten.any.dim, aten.any.dims):
        source = p.emit(node, aten._to_copy.default, source, dtype=torch.int32)
    made = _by_sequence(p, node, ByToken(source, x.dims), _BY_SEQUENCE[node.target])
    if g.dtype(made) != g.dtype(node):
        made = p.emit(node, aten._to_copy.default, made, dtype=g.dtype(node))
    if g.argument(node, "keepdim"):
        made = p.emit(node, aten.unsqueeze.default, made, x.s)
    return made


def _is_nonnegative(p: Packer, node: Any) -> bool:
    """Return whether it follows from the ops that no element is below 0."""
    if node is p.known.mask or not isinstance(node, fx.Node):
        return node is p.known.mask
    if node.target in _NONNEGATIVE:
        return True
    if node.target is aten.mul.Tensor:
        return all(_is_nonnegative(p, factor) for factor in node.args)
    return (node.target in _KEEPS_SIGN or is_view(node)) and _is_nonnegative(p, node.args[0])


def _require_hidden_nothing(p: Packer, node: fx.Node) -> None:
    """Raise Refused unless masked tokens cannot change the result for any values."""
    source = g.operand(node, 0)
    value = p.known.hidden(source)
    least = [-math.inf]
    if g.dtype(source).is_floating_point:
        least.append(torch.finfo(g.dtype(source)).min)
    if _is_nonnegative(p, source):
        least.append(0)
    neutral = least if node.target is aten.amax.default else [0]
    if value not in neutral:
        seen = "the graph does not tell what" if value is None else f"{value} is what"
        raise Refused(
            node, f"reduces over all columns, and {seen} it reads where the mask hides a token"
        )


def running_sum(p: Packer, node: fx.Node) -> ByToken:
    """Cumulative sum; along the columns it counts all tokens before, including masked ones."""
    x = p.operand(node)
    given: Any = node.args[1]
    d = int(given) % len(x.dims)
    if not {"s", "b"} & set(x.dims[d]):
        return p.token(p.emit(node, node.target, x.node, d, **node.kwargs), x.dims)
    if x.dims[d] != ("s",) or g.dtype(node) != torch.int64 or g.dtype(x.node).is_floating_point:
        p.apart(node, x, d)
    p.from_start = True
    return p.token(p.emit(node, sequence_cumsum, x.node, p.inputs["bounds"], d), x.dims)


SUMS: dict[Any, Rule] = {
    **dict.fromkeys(
        (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default,
         aten.any.dim, aten.any.dims, aten.all.dim, aten.all.dims, aten.var.correction,
         aten.std.correction, aten.linalg_vector_norm.default, aten.argmax.default,
         aten.argmin.default, aten.prod.dim_int), reduce),
    aten.cumsum.default: running_sum,
}  # fmt: skip
