"""Attention: the ops that `passes.attention` writes into the graph, defined by PyTorch's own ops.

In: q (batch, heads, q_len, head_dim), k and v (batch, kv_heads, k_len, head_dim), with any strides.
Out: (batch, q_len, heads, head_dim), dense: the (tokens, hidden) matrix that the next GEMM reads,
so that no transpose remains. One op, or two around a softmax kernel::

    attention(q, k, v, keys, scale=0.125)                    # keys: bool (batch, 1, 1, k_len)
    attention_values(softmax(attention_scores(q, k) * 0.125), v)
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

NO_WINDOW = (-1, -1)

_attend: Any = torch._C._nn.scaled_dot_product_attention
"""PyTorch's function, whatever a user has put in its place in torch.nn.functional."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    window: tuple[int, int] = NO_WINDOW,
    blind_nan: bool = False,
    blind_mean: bool = False,
    softcap: float = 0.0,
    late: bool = False,
) -> torch.Tensor:
    """Return softmax(q k^T * scale + bias) v, computed by PyTorch's own ops.

    keys: which keys exist, per batch row: bool (batch, 1, 1, k_len), or int64 (batch,), their
    number.
    bias: added (float) or masking (bool); broadcasts to (batch, heads, q_len, k_len).
    causal: mask keys after the query.
    window: (left, right): mask keys more than that many positions before and after the query; -1
    for no limit.
    late: the last query is aligned with the last key, as with a cache; otherwise the first query
    with the first key.
    blind_nan, blind_mean: the result of a query that sees no key. By default zeros, as in
    torch.nn.functional.scaled_dot_product_attention; with blind_nan NaN, as a softmax over scores
    of -inf; with blind_mean the mean of all values, as if the scores of masked keys were the most
    negative float.
    softcap: unless 0, scores become softcap * tanh(score / softcap) before the bias.
    sinks: float32 (heads,), one more score per query whose weight goes to no value. A query that
    sees no key then gets zeros, unless the sink is -inf.
    """
    visible, mask, plainly_causal = _visible(q, k, keys, causal, window, late), bias, False
    if bias is not None and bias.dtype is torch.bool:
        visible, mask = bias if visible is None else bias & visible, None
    if blind_mean and (visible is not None or mask is not None):
        least = torch.finfo(q.dtype).min
        mask = torch.zeros((), dtype=q.dtype, device=q.device) if mask is None else mask.to(q.dtype)
        mask = mask.clamp(min=least)
        mask = mask if visible is None else torch.where(visible, mask, least)
    elif mask is not None:
        mask = mask if visible is None else mask.masked_fill(~visible, float("-inf"))
        mask = mask.to(q.dtype)
    elif visible is not None:
        plain = bias is None and keys is None and tuple(window) == NO_WINDOW and not late
        plainly_causal = causal and plain
        mask = None if plainly_causal else visible
    grouped = _may_differ(q.shape[1], k.shape[1])
    if softcap or sinks is not None:
        if plainly_causal:
            mask = visible
        out = _attend_step_by_step(q, k, v, mask, scale, softcap, sinks)
    else:
        out = _attend(q, k, v, mask, is_causal=plainly_causal, scale=scale, enable_gqa=grouped)
    if blind_nan and mask is not None and k.shape[2] != 0:
        out = out.masked_fill(~_sees(mask, sinks), float("nan"))
    return out.permute(0, 2, 1, 3).contiguous()


def along_diagonals(line: torch.Tensor, rows: Any, columns: Any) -> torch.Tensor:
    """Return (..., rows, columns) whose element (i, j) is that of its diagonal, j - i + rows - 1 of
    `line`, (..., 1, rows + columns - 1).

    In a graph it is a view, with a negative stride along rows, which PyTorch has not: it gets a
    copy.
    """
    shape = (*line.shape[:-2], rows, columns)
    if isinstance(line, FakeTensor):
        return line.new_empty(shape)
    row, column = (torch.arange(n, device=line.device) for n in (rows, columns))
    return line[..., 0, :][..., column - row[:, None] + (rows - 1)]


def _sees(mask: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Return which queries see a key or have a sink that is not -inf."""
    seen = (mask if mask.dtype is torch.bool else mask != float("-inf")).any(-1, keepdim=True)
    return seen if sinks is None else seen | (sinks != float("-inf"))[:, None, None]


def _may_differ(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """Return whether two head counts are not known to be equal; adds no guard."""
    if isinstance(one, int) and isinstance(other, int):
        return one != other
    # Imports sympy, which a saved program runs without.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return not statically_known_true(one == other)


def _attend_step_by_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
    scale: float, softcap: float, sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    scores = attention_scores(q, k)
    if softcap:
        scores = softcap * torch.tanh(scores * (scale / softcap))
    else:
        scores = scores * scale
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        one = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, one], -1)
    shares = torch.ops.aten._safe_softmax.default(scores, -1).to(v.dtype)
    shares = shares if sinks is None else shares[..., :-1]
    return shares @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def _visible(
    q: torch.Tensor,
    k: torch.Tensor,
    keys: torch.Tensor | None,
    causal: bool,
    window: tuple[int, int],
    late: bool,
) -> torch.Tensor | None:
    """Return the mask of keys that each query sees, bias aside; None if it sees all."""
    place = torch.arange(k.shape[2], device=q.device)
    seen = None if keys is None else keys
    if keys is not None and keys.dtype is not torch.bool:
        seen = (place < keys[:, None])[:, None, None, :]
    ahead = place - torch.arange(q.shape[2], device=q.device)[:, None]
    if late:
        ahead = ahead - (k.shape[2] - q.shape[2])
    left, right = window
    limits = [ahead <= (0 if causal else right)] if causal or right >= 0 else []
    limits += [ahead >= -left] if left >= 0 else []
    for limit in limits:
        seen = limit if seen is None else seen & limit
    return seen


def attention_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return q k^T as float32 (batch, heads, q_len, k_len); each key head serves a group of
    heads."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1) if q.shape[1] != k.shape[1] else k
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.to(wide) @ k.to(wide).transpose(2, 3)


def attention_values(shares: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return shares v as (batch, q_len, heads, head_dim), dense, in v's dtype."""
    if isinstance(v, FakeTensor):
        # While tracing, a product would equate v's length with k's if they are separate dims.
        return v.new_empty(shares.shape[0], shares.shape[2], shares.shape[1], v.shape[3])
    v = (
        v.repeat_interleave(shares.shape[1] // v.shape[1], 1)
        if shares.shape[1] != v.shape[1]
        else v
    )
    return (shares @ v).permute(0, 2, 1, 3).contiguous()
