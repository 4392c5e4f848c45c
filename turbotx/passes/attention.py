"""Attention: recognises attention in the graph and rewrites it to the ops that the kernels compute.

In: a canonical graph with scaled_dot_product_attention calls, or the chain matmul, scale, mask,
softmax, matmul. Out: one `attention(q, k, v, ...)` node each, with the mask split into its parts
("flash"), or two products around a softmax that is fused like any other op::

    attention(q, k, v, key_ok, scale=0.125, causal=True)
    attention_values(safe_softmax(where(visible, attention_scores(q, k) * 0.125, -inf)), v)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from turbotx.errors import OptionsError
from turbotx.ir import fx_nodes as g
from turbotx.ir.attention_ops import NO_WINDOW, attention, attention_scores, attention_values
from turbotx.passes.chains import PRODUCTS, read_chain
from turbotx.passes.masks import Mask, understand_mask
from turbotx.passes.operands import share_heads, take_hidden, take_narrow, take_scale
from turbotx.passes.scores import AttentionPattern, hide_in_bias

aten = torch.ops.aten

# The largest head_dim that the flash kernels hold in registers.
WIDEST_HEAD = 256


def recognize_attention(graph: fx.Graph, way: str = "auto") -> None:
    """Rewrite every attention that the kernels can compute; others are left unchanged.

    way: "flash" or "fused-softmax" for all of them; "auto" for flash where its kernel can compute
    it, otherwise fused-softmax. Raises OptionsError if an explicitly requested way cannot compute
    one of torch's own attention calls.
    """
    for node in list(graph.nodes):
        if g.is_call(node, aten.scaled_dot_product_attention.default):
            found = _read_sdpa(node)
        elif g.is_call(node, *PRODUCTS):
            found = read_chain(node)
        else:
            continue
        if found is None:
            continue
        found = _take_conversions(node, found)
        k, v = share_heads(found.k), share_heads(found.v)
        if g.shape(k)[:2] == g.shape(v)[:2]:
            found = replace(found, k=k, v=v)
        write = _choose(node, found, way)
        if write is not None:
            with graph.inserting_before(node):
                found = _take_scales(_part_mask(found))
                new = write(node, found)
                if found.show is not None:
                    new = found.show(new)
                else:
                    new = g.emit(node, aten.permute.default, new, [0, 2, 1, 3])
            g.replace(node, new)


def _choose(node: fx.Node, found: AttentionPattern, way: str) -> Callable[..., fx.Node] | None:
    refused = _why_not_products(found)
    if not refused and way != "fused-softmax":
        no_flash = _why_not_flash(found)
        if not no_flash:
            return _write_flash
        refused = no_flash if way == "flash" else ""
    if not refused:
        return _write_fused_softmax
    if way != "auto" and g.is_call(node, aten.scaled_dot_product_attention.default):
        raise OptionsError(
            f"attention={way!r} cannot compute {node.name}, because {refused}; "
            f"attention='auto' finds another way\n{node.meta.get('stack_trace', '')}"
        )
    return None


def _read_sdpa(node: fx.Node) -> AttentionPattern | None:
    if g.argument(node, "dropout_p") != 0.0:
        return None
    q, k, v = (g.operand(node, i) for i in range(3))
    mask, scale = g.argument(node, "attn_mask"), g.argument(node, "scale")
    if scale is None:
        width = g.shape(q)[-1]
        scale = 1 / math.sqrt(int(width)) if width.is_Integer and width != 0 else math.nan
    causal = bool(g.argument(node, "is_causal"))
    return AttentionPattern(q, k, v, mask, float(scale), causal)


def _why_not_products(found: AttentionPattern) -> str:
    """Return why neither way can compute it; "" if both products can."""
    q, k, v = found.q, found.k, found.v
    shapes = [g.shape(n) for n in (q, k, v)]
    dtypes = {g.dtype(n) for n in (q, k, v)}
    if any(len(s) != 4 for s in shapes):
        return "its operands are not (batch, heads, length, head_dim)"
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        shown = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        return f"the kernels take float32, bfloat16 or float16, and its operands are {shown}"
    widths = [s[3] for s in shapes]
    if not all(w.is_Integer for w in widths) or widths[0] != widths[1] or widths[0] == 0:
        return "its head_dim is not one number above 0 known from the graph"
    heads = [s[1] for s in shapes]
    grouped = all(h.is_Integer for h in heads) and int(heads[0]) % int(heads[1]) == 0
    if heads[1] != heads[2] or not (heads[0] == heads[1] or grouped):
        return f"its heads do not fit together: {', '.join(map(str, heads))}"
    return ""


def _why_not_flash(found: AttentionPattern) -> str:
    """Return why the flash kernel cannot compute it, though the products can; "" if it can."""
    width, of_v = int(g.shape(found.q)[3]), int(g.shape(found.v)[3])
    if width != of_v:
        return f"v's head_dim {of_v} is not q's {width}"
    return f"its head_dim {width} is above {WIDEST_HEAD}" if width > WIDEST_HEAD else ""


def _take_conversions(node: fx.Node, found: AttentionPattern) -> AttentionPattern:
    """Leave out conversions of q and k from v's dtype to float32, in which kernels compute scores
    anyway (GPT-Neo)."""
    dtype = g.dtype(found.v)
    if dtype is torch.float32 or {g.dtype(found.q), g.dtype(found.k)} != {torch.float32}:
        return found
    with node.graph.inserting_before(node):
        q, k = (take_narrow(n, dtype) for n in (found.q, found.k))
    return found if q is None or k is None else replace(found, q=q, k=k)


def _take_scales(found: AttentionPattern) -> AttentionPattern:
    """Fold multiplications of q and k by numbers into the scale; k's is kept if v shares it."""
    if found.q in (found.k, found.v):
        return found
    q, factor = take_scale(found.q)
    found = replace(found, q=q, scale=found.scale * factor)
    if found.k is found.v:
        return found
    k, factor = take_scale(found.k)
    return replace(found, k=k, scale=found.scale * factor)


def _part_mask(found: AttentionPattern) -> AttentionPattern:
    """Split a mask whose masked scores are the most negative float: the kernel masks keys by
    sequence and position, or by a boolean that it reads where it is (GPT-Neo's buffer), and the
    bias keeps its small shape (T5's has no batch dim)."""
    parts = (found.mask, found.bias) if found.blind_mean else take_hidden(found.mask)
    if parts is None or found.causal:
        return found
    visible, bias = parts
    said = Mask()
    assert visible is not None, "it hides nothing"
    understand_mask(visible, found.q, found.k, said)
    own = said.late or g.shape(found.q)[2] == g.shape(found.k)[2]
    # In a band, every query sees at least its own position, beside which masked keys have no
    # weight.
    blind = bool(said.keys or said.rest) or not own
    return replace(found, mask=visible, bias=bias, blind_nan=False, blind_mean=blind)


def _split(found: AttentionPattern, late: bool | None = None) -> Mask:
    """late: required value of `Mask.late`; None for either."""
    said = Mask(causal=found.causal, late=False if found.causal else late)
    if found.mask is not None and g.dtype(found.mask) is torch.bool:
        understand_mask(found.mask, found.q, found.k, said)
    return said


def _write_flash(node: fx.Node, found: AttentionPattern) -> fx.Node:
    said = _split(found)
    counted = len(said.keys) == 1 and not found.blind_mean
    keys = said.lengths.get(said.keys[0]) if counted else None
    keys = _conjunction(node, said.keys) if keys is None else keys
    bias = _conjunction(node, said.rest)
    if found.mask is not None and g.dtype(found.mask) is not torch.bool:
        bias = _as_bias(node, found.mask, g.dtype(found.q))
    elif found.bias is not None:
        added = found.bias if bias is None else hide_in_bias(node, bias, found.bias, -math.inf)
        bias = _as_bias(node, added, g.dtype(found.q))
    kwargs: dict[str, Any] = {"scale": found.scale, "causal": said.causal}
    if said.window != NO_WINDOW:
        kwargs["window"] = said.window
    if said.late:
        kwargs["late"] = True
    if found.blind_nan:
        kwargs["blind_nan"] = True
    if found.blind_mean:
        kwargs["blind_mean"] = True
    if found.softcap:
        kwargs["softcap"] = found.softcap
    sinks = () if found.sinks is None else (found.sinks,)
    return g.emit(node, attention, found.q, found.k, found.v, keys, bias, *sinks, **kwargs)


def _as_bias(node: fx.Node, mask: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Return a mask of numbers in a dtype that kernels add: float32 or q's; others are cast to
    float32."""
    if g.dtype(mask) in (torch.float32, dtype):
        return mask
    return g.emit(node, aten._to_copy.default, mask, dtype=torch.float32)


def _write_fused_softmax(node: fx.Node, found: AttentionPattern) -> fx.Node:
    """Write two products with ordinary ops between them, which partition makes one kernel."""
    said = _split(found, late=False)
    scores = g.emit(node, attention_scores, found.q, found.k)
    below = g.emit(node, aten.mul.Tensor, scores, found.scale)
    if found.softcap:
        share = g.emit(node, aten.div.Tensor, below, found.softcap)
        share = g.emit(node, aten.tanh.default, share)
        below = g.emit(node, aten.mul.Tensor, share, found.softcap)
    visible = [*said.keys, *said.rest]
    left, right = said.window
    if said.causal or right >= 0:
        visible.append(_band(node, scores, aten.tril.default, 0 if said.causal else right))
    if left >= 0:
        visible.append(_band(node, scores, aten.triu.default, -left))
    if found.mask is not None and g.dtype(found.mask) is not torch.bool:
        below = g.emit(node, aten.add.Tensor, below, found.mask)
    if found.bias is not None:
        below = g.emit(node, aten.add.Tensor, below, found.bias)
    if visible:
        hidden = g.emit(node, aten.logical_not.default, _conjunction(node, visible))
        least = torch.finfo(torch.float32).min if found.blind_mean else -math.inf
        below = g.emit(node, aten.masked_fill.Scalar, below, hidden, least)
    if found.sinks is not None:
        shares = _share_with_sinks(node, below, found.sinks)
    elif found.blind_nan or found.blind_mean or not (visible or found.mask is not None):
        shares = g.emit(node, aten._softmax.default, below, -1, False)
    else:
        shares = g.emit(node, aten._safe_softmax.default, below, -1)
    if g.dtype(found.v) is not g.dtype(shares):
        shares = g.emit(node, aten._to_copy.default, shares, dtype=g.dtype(found.v))
    return g.emit(node, attention_values, shares, found.v)


def _share_with_sinks(node: fx.Node, scores: fx.Node, sinks: fx.Node) -> fx.Node:
    """Return the softmax over the scores and each head's sink, without the sink's own weight."""
    one = g.emit(node, aten.unflatten.int, sinks, 0, [-1, 1, 1])
    largest = g.emit(node, aten.amax.default, scores, [-1], True)
    largest = g.emit(node, aten.maximum.default, largest, one)
    powers = g.emit(node, aten.exp.default, g.emit(node, aten.sub.Tensor, scores, largest))
    rest = g.emit(node, aten.exp.default, g.emit(node, aten.sub.Tensor, one, largest))
    total = g.emit(node, aten.sum.dim_IntList, powers, [-1], True)
    total = g.emit(node, aten.add.Tensor, total, rest)
    return g.emit(node, aten.div.Tensor, powers, total)


def _band(node: fx.Node, scores: fx.Node, keep: Any, diagonal: int) -> fx.Node:
    ones = g.emit(node, aten.full_like.default, scores, True, dtype=torch.bool)
    return g.emit(node, keep, ones, diagonal)


def _conjunction(like: fx.Node, terms: list[fx.Node]) -> fx.Node | None:
    if not terms:
        return None
    whole = terms[0]
    for term in terms[1:]:
        whole = g.emit(like, aten.bitwise_and.Tensor, whole, term)
    return whole
