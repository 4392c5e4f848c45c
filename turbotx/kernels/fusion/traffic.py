"""Traffic: the bytes that a kernel moves, as functions of the shape.

In: an `ir.Kernel`. Out: a `Traffic` of sympy expressions in the dims, for example
for bias + residual + LayerNorm over 384 float32 columns::

    read 3072*batch*seq + 4608, written 1536*batch*seq, compulsory 4608*batch*seq + 4608

Only transfers from memory are counted: an element that a program or a cache already has is not read
again, so a weight vector counts once, and so does a row that a kernel walks along several times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from turbotx import ir
from turbotx.ir.expr import ONE, ZERO, Expr, evaluate, is_nonnegative, product


@dataclass(frozen=True)
class Traffic:
    """Bytes, in the captured dims.

    read, written: what the kernel moves. compulsory: every element that it needs and
    every result, once.
    """

    read_nbytes: Expr
    written_nbytes: Expr
    compulsory_nbytes: Expr

    def at(self, dims: Mapping[str, int]) -> tuple[int, int, int]:
        """Return the three at concrete dims."""
        read, written = evaluate(self.read_nbytes, dims), evaluate(self.written_nbytes, dims)
        return read, written, evaluate(self.compulsory_nbytes, dims)


def kernel_traffic(kernel: ir.Kernel) -> Traffic:
    """Return a kernel's traffic, with its rows in registers or a cache."""
    nbytes = param_nbytes(kernel)
    needed = sum(nbytes.values(), ZERO)
    written = sum((v for p, v in nbytes.items() if _role(kernel, p) == "out"), ZERO)
    return Traffic(sympy.expand(needed - written), sympy.expand(written), sympy.expand(needed))


def param_nbytes(kernel: ir.Kernel) -> dict[str, Expr]:
    """Return the bytes of each param's distinct elements that the kernel loads or stores."""
    accesses = [s for s in kernel.body if isinstance(s, (ir.Load, ir.Store))]
    return _touched(kernel, accesses)


def _role(kernel: ir.Kernel, name: str) -> str:
    return next(p.role for p in kernel.params if p.name == name)


def _touched(kernel: ir.Kernel, accesses: list[ir.Load | ir.Store]) -> dict[str, Expr]:
    """Return bytes by param; windows of one tensor that differ by a constant count once each.

    Masked loads are parts of a whole (the halves swapped in a rotary embedding, the parts of a
    cat): if the same tensor is also read in full, they add nothing.
    """
    found: dict[str, Expr] = {}
    for p in kernel.params:
        windows: dict[Expr, tuple[Expr, bool]] = {}
        for s in accesses:
            if s.access.param == p.name:
                windows[s.access.offset] = (_distinct(kernel, s.access), s.access.mask is not None)
        whole = [count for count, masked in windows.values() if not masked]
        parts = [count for count, masked in windows.values() if masked]
        total = sum(whole, ZERO) if whole else max(parts, key=str, default=ZERO)
        if total != 0:
            found[p.name] = _smaller(total, product(p.shape)) * p.dtype.itemsize
    return found


def _distinct(kernel: ir.Kernel, access: ir.Access) -> Expr:
    """Return the number of elements of an access: the product of the extents of the axes that it
    moves along."""
    names = ir.axes_of(access.offset, kernel.varies_over())
    return product([a.extent for a in kernel.axes if a.name in names]) if names else ONE


def _smaller(a: Expr, b: Expr) -> Expr:
    """Return the smaller of two sizes, simplified if it is known which."""
    if is_nonnegative(sympy.expand(b - a)):
        return a
    return b if is_nonnegative(sympy.expand(a - b)) else sympy.Min(a, b)
