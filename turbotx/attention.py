"""Attention: the op that `passes.attention` writes into the graph, and its meaning.

In: q (batch, heads, q_len, head_dim), k and v (batch, kv_heads, k_len, head_dim), read in place
by their strides. Out: (batch, q_len, heads, head_dim), dense: the (tokens, hidden) matrix that the
next GEMM reads, so that no transpose exists around it::

    attention(q, k, v, key_mask, scale=0.125)   # key_mask: bool (batch, 1, 1, k_len)
"""

from __future__ import annotations

import torch


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    blind_nan: bool = False,
) -> torch.Tensor:
    """Return softmax(q k^T * scale + bias) v by PyTorch's own ops: the kernel's meaning.

    key_mask hides keys per batch row; bias is added (float) or hides (bool) and broadcasts to
    (batch, heads, q_len, k_len); causal hides keys after the query. A query that sees no key
    gets zeros, as in torch.nn.functional.scaled_dot_product_attention, or with blind_nan NaN, as
    a softmax over scores of -inf gives.
    """
    mask = bias
    if key_mask is not None:
        if mask is None:
            mask = key_mask
        elif mask.dtype is torch.bool:
            mask = mask & key_mask
        else:
            mask = mask.masked_fill(~key_mask, float("-inf"))
    if causal and (mask is not None or blind_nan):
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        if mask is None:
            mask = visible
        elif mask.dtype is torch.bool:
            mask = mask & visible
        else:
            mask = mask.masked_fill(~visible, float("-inf"))
        causal = False
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(q.dtype)
    if blind_nan:
        return _by_softmax(q, k, v, mask, scale).permute(0, 2, 1, 3).contiguous()
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.permute(0, 2, 1, 3).contiguous()


def _by_softmax(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * scale
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ v.repeat_interleave(groups, 1)
