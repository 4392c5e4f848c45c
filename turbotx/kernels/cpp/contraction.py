"""Contraction: products that C++ must round before it adds to them.

In: a kernel. Out: its values that a compiler could make one fused instruction of with the sum that
reads them. It does so where every reader is a sum, so that one value would come out in two ways, in
two loops or two kernels, and a maximum would not be among what it is the maximum of::

    const float mul = ttx::product(x, c);      // mul + b: as PyTorch's two ops, in every loop
"""

from __future__ import annotations

from turbotx import ir

_EXACT = frozenset(
    ("add", "sub", "fma", "div", "div_rn", "sqrt", "floor", "ceil", "trunc", "round", "abs", "sign",
     "maximum", "minimum", "where", "cast", "bfloat16", "float16", "copysign")
)  # fmt: skip
"""Primitives whose last operation is no product."""


def find_products(kernel: ir.Kernel) -> frozenset[str]:
    """Return the floats that may end in a product, and that something is added to."""
    products = {
        s.result
        for s in kernel.body
        if isinstance(s, ir.Compute) and s.dtype.is_floating_point and s.op not in _EXACT
    }
    summed = {
        value
        for s in kernel.body
        if isinstance(s, (ir.Reduce, ir.Scan))
        or (isinstance(s, ir.Compute) and s.op in ("add", "sub"))
        for value in s.args
    }
    return frozenset(products & summed)
