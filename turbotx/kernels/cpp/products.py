"""Attention's two matrix products as launches of their own, around a fused softmax kernel.

In: the operands of `attention_scores` (q, k) or `attention_values` (shares, v) in the graph. Out: a
`ProductKernel`, its launch's sizes, and one extern "C" function, a call of a template::

    args: q, k, scores | shares, v, out     sizes: the names in SIZES, strides in elements
"""

from __future__ import annotations

from turbotx import ir
from turbotx.ir.expr import Expr
from turbotx.ir.matmul_kernels import ProductKernel
from turbotx.kernels.cpp.printer import STORAGE

SIZES = (
    "batch", "heads", "kv_heads", "q_len", "k_len",
    "a.batch", "a.head", "a.row", "b.batch", "b.head", "b.row", "out.batch", "out.head", "out.row",
)  # fmt: skip


def describe_product(
    which: str, a: ir.Operand, b: ir.Operand, out: ir.Operand
) -> tuple[ProductKernel, tuple[Expr, ...]]:
    """Return the kernel of a product and its launch's sizes.

    a: q (batch, heads, q_len, head_dim) or shares (batch, heads, q_len, k_len); b: k or v (batch,
    kv_heads, k_len, head_dim); out: scores as shares, or (batch, q_len, heads, head_dim).
    """
    kernel = ProductKernel(which, b.dtype, int(b.shape[3]))
    steps = out.strides
    if which == "values":
        steps = (steps[0], steps[2], steps[1])
    sizes = (a.shape[0], a.shape[1], b.shape[1], a.shape[2], b.shape[2])
    return kernel, (*sizes, *a.strides[:3], *b.strides[:3], *steps[:3])


def print_product(kernel: ProductKernel, name: str) -> str:
    """Return the C++ definition of the launch function."""
    kind = STORAGE[kernel.dtype]
    scores = kernel.which == "scores"
    fields = {"a": "q", "b": "k"} if scores else {"b": "v", "out": "out"}
    lines = [
        f'extern "C" int {name}(void* const* args, const int64_t* sizes) {{',
        "  ttx::AttentionShape s;",
    ]
    for i, size in enumerate(SIZES):
        owner, _, step = size.partition(".")
        if not step or owner in fields:
            lines.append(
                f"  s.{fields[owner]}.{step} = sizes[{i}];" if step else f"  s.{size} = sizes[{i}];"
            )
    lines += [
        f"  ttx::attention_{kernel.which}<{kind}, {kernel.head_dim}>(",
        f"      static_cast<const {kind}*>(args[0]), static_cast<const {kind}*>(args[1]),",
        f"      static_cast<{'float' if scores else kind}*>(args[2]), s);",
        "  return 0;",
        "}",
    ]
    return "\n".join(lines) + "\n"
