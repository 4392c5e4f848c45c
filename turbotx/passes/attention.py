"""Attention: recognise it in the graph, and find out what its mask really says.

In: a canonical graph with scaled_dot_product_attention calls, or the chain matmul, scale, mask,
softmax, matmul. Out: `attention(q, k, v, ...)` nodes that return (batch, q_len, heads, head_dim),
as the next GEMM reads it, and whose mask is split into what it is made of::

    expand(key_ok & (k <= q))  ->  key_mask=key_ok, causal=True
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from turbotx import graph as g
from turbotx import ir
from turbotx.attention import attention
from turbotx.loops import Conflict, Loops, SplitAxis
from turbotx.passes.operands import share_heads, take_scale
from turbotx.pull import Puller
from turbotx.sizes import expr

aten = torch.ops.aten


@dataclass
class Mask:
    """What a mask says: keys hidden per batch row, causality, and what is left over."""

    keys: list[fx.Node] = field(default_factory=list)
    rest: list[fx.Node] = field(default_factory=list)
    causal: bool = False


def recognize_attention(graph: fx.Graph) -> None:
    """Replace every attention that the kernels can compute; others stay as they are."""
    for node in list(graph.nodes):
        if g.is_call(node, aten.scaled_dot_product_attention.default):
            _replace_sdpa(node)
        elif g.is_call(node, aten.matmul.default, aten.bmm.default):
            _replace_chain(node)


def _replace_sdpa(node: fx.Node) -> None:
    q, k, v = node.args[:3]
    mask = g.argument(node, "attn_mask")
    if g.argument(node, "dropout_p") != 0.0:
        return
    scale = g.argument(node, "scale")
    _emit(node, q, k, v, mask, scale, bool(g.argument(node, "is_causal")))


def _emit(
    node: fx.Node, q: Any, k: Any, v: Any, mask: Any, scale: Any, causal: bool,
    blind_nan: bool = False,
) -> None:  # fmt: skip
    k, v = share_heads(k), share_heads(v)
    if not _fits(q, k, v):
        return
    width = int(g.shape(q)[-1])
    scale = 1 / math.sqrt(width) if scale is None else float(scale)
    q, factor = (q, 1.0) if q in (k, v) else take_scale(q)
    said = Mask(causal=causal)
    with node.graph.inserting_before(node):
        if mask is not None and g.dtype(mask) is torch.bool:
            _understand(mask, q, k, said)
            key_mask = _conjunction(node, said.keys)
            bias = _conjunction(node, said.rest)
        else:
            key_mask, bias = None, mask
        kwargs = {"scale": scale * factor, "causal": said.causal} | (
            {"blind_nan": True} if blind_nan else {}
        )
        new = g.emit(node, attention, q, k, v, key_mask, bias, **kwargs)
        new = g.emit(node, aten.permute.default, new, [0, 2, 1, 3])
    g.replace(node, new)


def _fits(q: Any, k: Any, v: Any) -> bool:
    """Four dims, one head_dim, heads a multiple of the key heads, and rows readable in place."""
    shapes = [g.shape(n) for n in (q, k, v)]
    if any(len(s) != 4 for s in shapes) or g.dtype(q) != g.dtype(k) or g.dtype(q) != g.dtype(v):
        return False
    if not g.dtype(q).is_floating_point or g.dtype(q) is torch.float64:
        return False
    heads = [s[1] for s in shapes]
    widths = {s[3] for s in shapes}
    if len(widths) != 1 or not shapes[0][3].is_Integer or int(shapes[0][3]) > 256:
        return False
    if heads[1] != heads[2]:
        return False
    if heads[0] == heads[1]:
        return True
    return heads[0].is_Integer and heads[1].is_Integer and int(heads[0]) % int(heads[1]) == 0


def _understand(mask: fx.Node, q: fx.Node, k: fx.Node, said: Mask) -> None:
    """Split a conjunction into its terms and say what each of them is."""
    if g.is_call(mask, aten.expand.default):
        _understand(mask.args[0], q, k, said)  # type: ignore[arg-type]
        return
    if g.is_call(mask, aten.bitwise_and.Tensor, aten.logical_and.default):
        for term in mask.args:
            _understand(term, q, k, said)  # type: ignore[arg-type]
        return
    value = _meaning(mask)
    if value == "true":
        return
    shape = (expr(1),) * (4 - len(g.shape(mask))) + g.shape(mask)
    if shape[1] == 1 and shape[2] == 1:
        said.keys.append(mask)
    elif value == "causal" and shape[2:] == (g.shape(q)[2], g.shape(k)[2]) and shape[2] == shape[3]:
        said.causal = True
    else:
        said.rest.append(mask)


def _meaning(mask: fx.Node) -> str:
    """Return "true", "causal" (key position <= query position) or "other", by lowering the mask."""
    loops = Loops({})
    lowering = Puller(lambda n: n.op in ("placeholder", "get_attr"), loops)
    index = tuple(loops.make(extent, f"a{d}") for d, extent in enumerate(g.shape(mask)))
    try:
        element = lowering.element(mask, index)
    except (Conflict, SplitAxis):
        return "other"
    if element.value is True:
        return "true"
    made = {s.result: s for s in lowering.body if isinstance(s, (ir.Compute, ir.Index))}
    last = made.get(element.name)
    if len(index) < 2 or not isinstance(last, ir.Compute) or last.op not in ("le", "ge"):
        return "other"
    sides = [made.get(a) for a in last.args]
    if last.op == "ge":
        sides.reverse()
    if not all(isinstance(s, ir.Index) for s in sides):
        return "other"
    is_causal = (sides[0].value, sides[1].value) == (index[-1], index[-2])  # type: ignore[union-attr]
    return "causal" if is_causal else "other"


def _conjunction(like: fx.Node, terms: list[fx.Node]) -> fx.Node | None:
    if not terms:
        return None
    whole = terms[0]
    for term in terms[1:]:
        whole = g.emit(like, aten.bitwise_and.Tensor, whole, term)
    return whole


# --- the chain: softmax(q @ k^T * scale + mask) @ v -----------------------------------------


def _replace_chain(node: fx.Node) -> None:
    """`node` is the last matmul; walk back through softmax, mask and scale to the first."""
    weights, v = node.args
    scores = _sole_input(weights, aten._to_copy.default, aten.expand.default)
    if not g.is_call(scores, aten.softmax.int, aten._softmax.default) or len(scores.users) > 1:
        return
    if scores.args[1] not in (-1, len(g.shape(scores)) - 1):
        return
    below, mask, scale = scores.args[0], None, 1.0
    below = _sole_input(below, aten._to_copy.default)
    if g.is_call(below, aten.add.Tensor) and below.kwargs.get("alpha", 1) == 1:
        left, right = below.args
        if not (g.is_tensor(left) and g.is_tensor(right)) or len(below.users) > 1:
            return
        below, mask = (left, right) if _is_scores(left) else (right, left)
    else:
        below, mask = _unhidden(below)
    below, scale = _scaled(below)
    if not g.is_call(below, aten.matmul.default, aten.bmm.default) or len(below.users) > 1:
        return
    q, k_t = below.args
    q, q_scale = _scaled(q)
    if len(g.shape(k_t)) != 4:
        return
    with node.graph.inserting_before(node):
        k = g.emit(node, aten.permute.default, k_t, [0, 1, 3, 2])
    _emit(node, q, k, v, mask, scale * q_scale, False, blind_nan=mask is not None)


def _sole_input(node: Any, *through: Any) -> Any:
    while g.is_call(node, *through) and len(node.users) == 1 and g.is_tensor(node.args[0]):
        if g.shape(node.args[0]) != g.shape(node):
            break
        node = node.args[0]
    return node


def _is_scores(node: Any) -> bool:
    return g.is_call(_scaled(node)[0], aten.matmul.default, aten.bmm.default)


def _unhidden(node: Any) -> tuple[Any, fx.Node | None]:
    """Return (scores, visible) for scores hidden by -inf; (node, None) otherwise."""
    if g.is_call(node, aten.masked_fill.Scalar) and node.args[2] == -math.inf:
        return node.args[0], _negated(node.args[1])
    if g.is_call(node, aten.where.self) and len(node.users) == 1:
        condition, x, y = node.args
        if _is_minus_infinity(x) and _is_scores(y):
            return y, _negated(condition)
        if _is_minus_infinity(y) and _is_scores(x):
            return x, condition
    return node, None


def _is_minus_infinity(node: Any) -> bool:
    made = g.is_call(node, aten.scalar_tensor.default, aten.full.default)
    return made and g.argument(node, "s" if len(node.args) == 1 else "fill_value") == -math.inf


def _scaled(node: Any) -> tuple[Any, float]:
    """Return (x, factor) for x * number and x / number; (node, 1) otherwise."""
    if g.is_call(node, aten.mul.Tensor) and isinstance(node.args[1], (int, float)):
        return node.args[0], float(node.args[1])
    if g.is_call(node, aten.div.Tensor) and isinstance(node.args[1], (int, float)):
        return node.args[0], 1 / float(node.args[1])
    return node, 1.0


def _negated(mask: fx.Node) -> fx.Node:
    if g.is_call(mask, aten.bitwise_not.default, aten.logical_not.default):
        (source,) = mask.args
        if g.is_tensor(source) and g.dtype(source) is torch.bool:  # type: ignore[arg-type]
            return source  # type: ignore[return-value]
    with mask.graph.inserting_after(mask):
        return g.emit(mask, aten.logical_not.default, mask)
