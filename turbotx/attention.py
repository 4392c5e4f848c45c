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
) -> torch.Tensor:
    """Return softmax(q k^T * scale + bias) v by PyTorch's own ops: the kernel's meaning.

    key_mask hides keys per batch row; bias is added (float) or hides (bool) and broadcasts to
    (batch, heads, q_len, k_len); causal hides keys after the query. A query that sees no key
    gets zeros, as in torch.nn.functional.scaled_dot_product_attention.
    """
    mask = bias
    if key_mask is not None:
        if mask is None:
            mask = key_mask
        elif mask.dtype is torch.bool:
            mask = mask & key_mask
        else:
            mask = mask.masked_fill(~key_mask, float("-inf"))
    if causal and mask is not None:
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        mask = (
            mask & visible
            if mask.dtype is torch.bool
            else mask.masked_fill(~visible, float("-inf"))
        )
        causal = False
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(q.dtype)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.permute(0, 2, 1, 3).contiguous()
