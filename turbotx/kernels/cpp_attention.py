"""Print an attention launch as C++: a call of the attention template with everything fixed
that the graph fixes.

In: dtype, head_dim, scale and which masks there are. Out: one extern "C" function with the
uniform signature of every launch::

    args: q, k, v, out, key_mask or null, bias or null
    sizes: the names in SIZES, in order, strides in elements
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turbotx.kernels.cpp import STORAGE

SIZES = (
    "batch", "heads", "kv_heads", "q_len", "k_len",
    "q.batch", "q.head", "q.row", "k.batch", "k.head", "k.row", "v.batch", "v.head", "v.row",
    "out.batch", "out.head", "out.row", "key_mask_stride",
    "bias_batch", "bias_head", "bias_q", "bias_k",
)  # fmt: skip


@dataclass(frozen=True)
class AttentionKernel:
    """What is fixed about an attention launch.

    bias is "none", "boolean", "float32" or "storage" (the dtype of q). A query that sees no key
    gets zeros, or NaN with blind_nan.
    """

    dtype: torch.dtype
    head_dim: int
    scale: float
    causal: bool
    bias: str
    blind_nan: bool = False

    @property
    def name(self) -> str:
        kind = STORAGE[self.dtype].rsplit(":", 1)[-1]
        causal = "_causal" if self.causal else ""
        bias = "" if self.bias == "none" else f"_{self.bias}_bias"
        blind = "_nan" if self.blind_nan else ""
        return f"attention_{kind}_{self.head_dim}{causal}{bias}{blind}"


def print_attention(kernel: AttentionKernel, name: str) -> str:
    """Return the C++ definition of the launch function."""
    kind = STORAGE[kernel.dtype]
    fields = [f"  s.{name} = sizes[{i}];" for i, name in enumerate(SIZES)]
    const = f"static_cast<const {kind}*>"
    lines = [
        f'extern "C" int {name}(void* const* args, const int64_t* sizes) {{',
        "  ttx::AttentionShape s;",
        *fields,
        f"  s.scale = {kernel.scale!r}f;",
        f"  s.causal = {'true' if kernel.causal else 'false'};",
        *["  s.blind_nan = true;"] * kernel.blind_nan,
        "  s.key_mask = static_cast<const bool*>(args[4]);",
        "  s.bias = args[5];",
        f"  s.bias_kind = ttx::Bias::{kernel.bias};",
        f"  ttx::attention<{kind}, {kernel.head_dim}>(",
        f"      {const}(args[0]), {const}(args[1]), {const}(args[2]),",
        f"      static_cast<{kind}*>(args[3]), s);",
        "  return 0;",
        "}",
    ]
    return "\n".join(lines) + "\n"
