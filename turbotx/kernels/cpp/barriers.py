"""Barriers in C++: values that the compiler must not optimize across.

In: a kernel. Out: its products that must be rounded before an addition (no FMA), and the constants
of masks that must be unknown at compile time::

    const float mul = ttx::product(x, c);           // mul + b: as PyTorch's two ops, in every loop
    const int64_t c = ttx::hidden(int64_t(2));      // i >= c is then known at run time only
"""

from __future__ import annotations

import sympy

from turbotx import ir

_EXACT = frozenset(
    ("add", "sub", "fma", "div", "div_rn", "sqrt", "floor", "ceil", "trunc", "round", "abs", "sign",
     "maximum", "minimum", "where", "cast", "bfloat16", "float16", "copysign")
)  # fmt: skip
"""Primitives whose last operation is no product."""


VECTOR_NBYTES = 64


def find_products(kernel: ir.Kernel) -> frozenset[str]:
    """Return the float values that may be products and are operands of sums.

    A compiler may contract both into an FMA, depending on the readers, so that a value would differ
    between loops or kernels, and a maximum would not equal any of its elements.
    """
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


def find_hidden(kernel: ir.Kernel) -> frozenset[str]:
    """Return the constants of masks that may be partial within a vector.

    GCC 12 replaces a masked vector load with a compile-time mask, as in a cat of two columns each,
    by a load of the whole vector and a blend, and so reads before the tensor. If a part begins at a
    multiple of the vector length, each vector's mask is all true or all false, and is left visible:
    the halves of a rotary embedding, for example.
    """
    makers = {r: s for s in kernel.body for r in ir.results_of(s)}
    itemsize = {p.name: p.dtype.itemsize for p in kernel.params}
    found: set[str] = set()
    for s in kernel.body:
        if isinstance(s, (ir.Load, ir.Store)) and s.access.mask:
            lanes = VECTOR_NBYTES // itemsize[s.access.param]
            todo = [s.access.mask]
            while todo:
                maker = makers[todo.pop()]
                if isinstance(maker, ir.Constant):
                    found.add(maker.result)
                elif not _is_whole(kernel, maker, makers, lanes):
                    todo += ir.needs_of(maker)
    return frozenset(found)


def _is_whole(
    kernel: ir.Kernel, s: ir.Statement, makers: dict[str, ir.Statement], lanes: int
) -> bool:
    """Return whether a comparison is uniform within each vector of `lanes` columns."""
    if not isinstance(s, ir.Compute) or s.op not in ("ge", "lt"):
        return False
    position, bound = (makers[a] for a in s.args)
    if not isinstance(position, ir.Index) or not isinstance(bound, ir.Constant):
        return False
    inner = {axes[-1].symbol for axes in (kernel.axes, kernel.rows) if axes}
    terms = sympy.Add.make_args(sympy.expand(position.value - bound.value))
    along = [t for t in terms if t.free_symbols & inner]
    steps = [t.as_coeff_Mul()[0] for t in terms if t not in along]
    return not along or (
        len(along) == 1
        and along[0] in inner
        and all(k.is_Integer and k % lanes == 0 for k in steps)
    )
