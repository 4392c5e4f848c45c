"""Attention the way of TurboTransformers: a GEMM, one scale + mask + softmax kernel, a GEMM.

In: an `AttentionKernel` and whether there is a key mask. Out: the `ir.Kernel` of the middle one,
which prints as any other does (Triton and C++), over scores (batch, heads, q_len, k_len)::

    shares[b, h, q, k] = softmax over k of (scores * scale + bias, hidden keys at -inf)

A query that sees no key gets zeros, or NaN with blind_nan, as in the flash kernel.
"""

from __future__ import annotations

import math

import sympy
import torch

from turbotx import ir
from turbotx.kernels.cpp_attention import AttentionKernel
from turbotx.sizes import dim

F32 = torch.float32


def softmax_kernel(attention: AttentionKernel, key_mask: bool = False) -> ir.Kernel:
    """Return the kernel between the two GEMMs.

    Params: scores, [key_mask: bool (batch, k_len)], [bias], shares (as scores). The bias is read at
    the strides bias_batch, bias_head, bias_q and bias_k, sizes of the kernel.
    """
    batch, heads, q_len, k_len = (dim(n) for n in ("batch", "heads", "q_len", "k_len"))
    axes = (
        ir.Axis("row2", batch), ir.Axis("row1", heads), ir.Axis("row", q_len),
        ir.Axis("col", k_len, "row"),
    )  # fmt: skip
    b, h, q, k = (a.symbol for a in axes)
    place = sympy.expand(((b * heads + h) * q_len + q) * k_len + k)
    shape = (batch, heads, q_len, k_len)
    params = [ir.Param("scores", attention.dtype, shape, "in")]
    body: list[ir.Statement] = [
        ir.Load("score", ir.Access("scores", place), F32),
        ir.Constant("scale", attention.scale, F32),
        ir.Compute("scaled", "mul", ("score", "scale"), F32),
    ]
    score, visible = "scaled", ""

    def hide(condition: str) -> None:
        nonlocal visible
        if visible:
            body.append(ir.Compute(f"{condition}_too", "and", (visible, condition), torch.bool))
        visible = f"{condition}_too" if visible else condition

    if attention.bias != "none":
        kinds = {"boolean": torch.bool, "float32": F32, "storage": attention.dtype}
        kind = kinds[attention.bias]
        steps = [dim(n) for n in ("bias_batch", "bias_head", "bias_q", "bias_k")]
        at = sum((i * s for i, s in zip((b, h, q, k), steps, strict=True)), sympy.Integer(0))
        params.append(ir.Param("bias", kind, shape, "in"))
        boolean = kind is torch.bool
        body.append(ir.Load("bias_value", ir.Access("bias", at), torch.bool if boolean else F32))
        if boolean:
            hide("bias_value")
        else:
            body.append(ir.Compute("biased", "add", ("scaled", "bias_value"), F32))
            score = "biased"
    if key_mask:
        params.append(ir.Param("key_mask", torch.bool, (batch, k_len), "in"))
        at = sympy.expand(b * k_len + k)
        body.append(ir.Load("key_visible", ir.Access("key_mask", at), torch.bool))
        hide("key_visible")
    if attention.causal:
        body += [
            ir.Index("key", k),
            ir.Index("query", q),
            ir.Compute("past", "le", ("key", "query"), torch.bool),
        ]
        hide("past")
    body.append(ir.Constant("hidden", -math.inf, F32))
    if visible:
        body.append(ir.Compute("seen", "where", (visible, score, "hidden"), F32))
        score = "seen"
    body += _normalize(score, attention.blind_nan)
    body.append(ir.Store(ir.Access("shares", place), "share"))
    params.append(ir.Param("shares", attention.dtype, shape, "out"))
    name = attention.name.replace("attention", "fused_softmax") + "_masked" * key_mask
    source = f"softmax(scores * {attention.scale!r})"
    return ir.Kernel(name, tuple(params), axes, tuple(body), (source,))


def _normalize(score: str, blind_nan: bool) -> list[ir.Statement]:
    share: list[ir.Statement] = [
        ir.Reduce(("largest", "total"), "softmax", (score,), F32),
        ir.Compute("below", "sub", (score, "largest"), F32),
        ir.Compute("power_", "exp", ("below",), F32),
        ir.Compute("share" if blind_nan else "part", "div", ("power_", "total"), F32),
    ]
    if blind_nan:  # of a row of -inf: exp(-inf - -inf)
        return share
    return [
        *share,
        ir.Compute("blind", "eq", ("largest", "hidden"), torch.bool),
        ir.Constant("none", 0.0, F32),
        ir.Compute("share", "where", ("blind", "none", "part"), F32),
    ]
