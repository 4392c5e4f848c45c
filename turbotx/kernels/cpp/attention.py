"""Attention launches: compile-time properties, and the C++ text, a call of a template.

In: the operands of an attention node. Out: an `AttentionKernel`, the sizes of its launch, and one
extern "C" function with the signature of all launches::

    args: q, k, v, out, key mask or lengths or null, bias or null, sinks or null; bounds
        and starts if packed; a cache's memory, tables of keys and of values or null if cached
    sizes: the names in SIZES, in order, strides in elements; if cached the columns of the tables
        and the rows of a block
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from turbotx import ir
from turbotx.ir.attention_ops import NO_WINDOW
from turbotx.ir.expr import ZERO, Expr
from turbotx.ir.matmul_kernels import AttentionKernel
from turbotx.kernels.cpp.printer import STORAGE

SIZES = (
    "batch", "heads", "kv_heads", "q_len", "k_len",
    "q.batch", "q.head", "q.row", "k.batch", "k.head", "k.row", "v.batch", "v.head", "v.row",
    "out.batch", "out.head", "out.row", "key_mask_stride",
    "bias_batch", "bias_head", "bias_q", "bias_k",
)  # fmt: skip


_BLOCK_FIELDS = [
    f"  s.columns = sizes[{len(SIZES)}];",
    f"  s.block_len = sizes[{len(SIZES) + 1}];",
    "  s.k_blocks = static_cast<const int64_t*>(args[8]);",
    "  s.v_blocks = static_cast<const int64_t*>(args[9]);",
]
_MEMORY = tuple(
    f"args[s.{name}_blocks == nullptr ? {k} : 7]" for k, name in enumerate("kv", start=1)
)


def describe_attention(
    operands: tuple[ir.Operand, ir.Operand, ir.Operand, ir.Operand],
    keys: ir.Operand | None,
    bias: ir.Operand | None,
    sinks: ir.Operand | None,
    said: Mapping[str, Any],
    sequences: Sequence[ir.Operand] = (),
) -> tuple[AttentionKernel, tuple[Expr, ...]]:
    """Return the kernel of an attention node and its launch's sizes.

    operands: q, k, v and out, the last (batch, q_len, heads, head_dim), all contiguous along
    head_dim. said: the keyword arguments of the call. sequences: bounds and starts if packed.
    """
    q, k, _, out = operands
    kinds = {torch.bool: "boolean", torch.float32: "float32"}
    kernel = AttentionKernel(
        q.dtype,
        int(q.shape[3]),
        float(said["scale"]),
        bool(said.get("causal", False)),
        "none" if bias is None else kinds.get(bias.dtype, "storage"),
        "all" if keys is None else "mask" if keys.dtype is torch.bool else "lengths",
        tuple(said.get("window", NO_WINDOW)),
        bool(said.get("blind_nan", False)),
        bool(said.get("blind_mean", False)),
        float(said.get("softcap", 0.0)),
        bool(said.get("late", False)),
        sinks is not None,
        bool(sequences),
    )
    strides = [s for o in operands[:3] for s in o.strides[:3]]
    strides += [out.strides[0], out.strides[2], out.strides[1]]
    strides.append(_broadcast(keys)[0] if kernel.keys == "mask" else ZERO)
    strides += _broadcast(bias)
    batch = sequences[1].shape[0] if sequences else q.shape[0]
    return kernel, (batch, q.shape[1], k.shape[1], q.shape[2], k.shape[2], *strides)


def _broadcast(operand: ir.Operand | None) -> list[Expr]:
    """Return strides over four dims, 0 for broadcast dims."""
    given = () if operand is None else operand.strides
    return [ZERO] * (4 - len(given)) + list(given)


def print_attention(kernel: AttentionKernel, name: str) -> str:
    """Return the C++ definition of the launch function."""
    kind = STORAGE[kernel.dtype]
    fields = [f"  s.{name} = sizes[{i}];" for i, name in enumerate(SIZES)]
    const = f"static_cast<const {kind}*>"
    if kernel.keys == "mask":
        fields.append("  s.key_mask = static_cast<const bool*>(args[4]);")
    elif kernel.keys == "lengths":
        fields.append("  s.lengths = static_cast<const int64_t*>(args[4]);")
    left, right = kernel.window
    fields += [f"  s.window_left = {left};"] * (left >= 0)
    fields += [f"  s.window_right = {right};"] * (right >= 0)
    fields += ["  s.blind_nan = true;"] * kernel.blind_nan
    fields += ["  s.blind_mean = true;"] * kernel.blind_mean
    fields += ["  s.sinks = static_cast<const float*>(args[6]);"] * kernel.sinks
    fields += [f"  s.softcap = {kernel.softcap!r}f;"] * (kernel.softcap != 0)
    fields += ["  s.diagonal = s.k_len - s.q_len;"] * kernel.late
    fields += [
        f"  s.{name} = static_cast<const int64_t*>(args[{k}]);"
        for k, name in enumerate(("bounds", "starts"), start=7) if kernel.packed
    ]  # fmt: skip
    fields += _BLOCK_FIELDS * kernel.cached
    reads = kernel.cached and not kernel.stores
    k, v = _MEMORY if reads else ("args[1]", "args[2]")
    called = "packed_" * kernel.packed + "cached_" * kernel.stores + "attention"
    memory = f" static_cast<{kind}*>(args[7])," * kernel.stores
    lines = [
        f'extern "C" int {name}(void* const* args, const int64_t* sizes) {{',
        "  ttx::AttentionShape s;",
        *fields,
        f"  s.scale = {kernel.scale!r}f;",
        f"  s.causal = {'true' if kernel.causal else 'false'};",
        "  s.bias = args[5];",
        f"  s.bias_kind = ttx::Bias::{kernel.bias};",
        f"  ttx::{called}<{kind}, {kernel.head_dim}>(",
        f"      {const}(args[0]), {const}({k}), {const}({v}),",
        f"      static_cast<{kind}*>(args[3]),{memory} s);",
        "  return 0;",
        "}",
    ]
    return "\n".join(lines) + "\n"
