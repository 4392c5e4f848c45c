"""Sequential: replaces tuple reductions by sequential steps for C++.

In: a kernel whose reductions may be tuples (mean and m2, largest and total). Out: an equivalent
kernel with plain sums and maxima. A row stays in the L1 cache, so that a second pass over it causes
no memory traffic, and no accuracy is lost::

    mean, m2 = welford(x)  ->  mean = sum(x) / n;  m2 = sum((x - mean)**2) - sum(x - mean)**2 / n
"""

from __future__ import annotations

from dataclasses import replace

import torch

from turbotx import ir
from turbotx.ir.expr import Expr, product
from turbotx.kernels.cpp.sweeps import Sweeps
from turbotx.kernels.cpp.tiles import wants_tiles


def make_sequential(kernel: ir.Kernel) -> ir.Kernel:
    """Return the kernel with every tuple reduction split into plain ones."""
    blocks = sums_in_blocks(kernel)
    body: list[ir.Statement] = []
    known: dict[tuple[str, tuple[str, ...]], str] = {}
    renamed: dict[str, str] = {}

    def compute(result: str, op: str, args: tuple[str, ...], dtype: torch.dtype) -> str:
        key = (op, args)
        if key not in known:
            known[key] = result
            body.append(ir.Compute(result, op, args, dtype))
        return known[key]

    for s in kernel.body:
        s = ir.rename(s, renamed)
        if isinstance(s, ir.Compute):
            name = compute(s.result, s.op, s.args, s.dtype) if s.op != "cast" else s.result
            if s.op == "cast":
                body.append(s)
            elif name != s.result:
                renamed[s.result] = name
        elif isinstance(s, ir.Reduce) and s.op == "welford":
            made = _moments(s, product([a.extent for a in kernel.columns]), blocks)
            known.update({(m.op, m.args): m.result for m in made
                          if isinstance(m, ir.Compute) and m.op != "cast"})  # fmt: skip
            if blocks:
                known["sub", (*s.args, s.results[0])] = f"{s.results[0]}_centred"
            body += made
        elif isinstance(s, ir.Reduce) and s.op == "softmax":
            largest, total = s.results
            (x,) = s.args
            body.append(ir.Reduce((largest,), "max", (x,), s.dtype))
            below = compute(f"{largest}_below", "sub", (x, largest), s.dtype)
            share = compute(f"{largest}_exp", "exp", (below,), s.dtype)
            body.append(ir.Reduce((total,), "sum", (share,), s.dtype))
        else:
            body.append(s)
    return replace(kernel, body=tuple(body))


def equal_block(extent: Expr) -> int | None:
    """Return a block size, a multiple of the vector length, that divides a known extent, or
    None."""
    if not extent.is_Integer:
        return None
    fitting = [n for n in range(64, 129, 16) if int(extent) % n == 0]
    return fitting[-1] if fitting else None


def sums_in_blocks(kernel: ir.Kernel) -> bool:
    """Return whether row sums are accumulated in float over blocks of columns."""
    if not kernel.columns or equal_block(kernel.columns[-1].extent) is None:
        return False
    return not wants_tiles(kernel, Sweeps(kernel))


def _moments(s: ir.Reduce, count: Expr, blocks: bool) -> list[ir.Statement]:
    """Return statements that compute mean and m2 of a row, with per-row values in double.

    The sum of the deviations gives the rounding error of the mean; if the sum was made in blocks,
    the mean is corrected by it. (Otherwise it is dominated by the deviations' own rounding.) A row
    of equal numbers has exactly that mean, and m2 = 0.
    """
    (mean, m2), (x,), wide = s.results, s.args, torch.float64
    made: list[ir.Statement] = []

    def compute(name: str, op: str, *args: str, dtype: torch.dtype = wide) -> str:
        made.append(ir.Compute(name, op, args, dtype))
        return name

    def total(name: str, value: str) -> str:
        made.append(ir.Reduce((name,), "sum", (value,), wide))
        return name

    made.append(ir.Index(f"{mean}_size", count))
    n = compute(f"{mean}_count", "cast", f"{mean}_size")
    near = compute(f"{mean}_wide", "div", total(f"{mean}_total", x), n)
    near = compute(f"{mean}_near" if blocks else mean, "cast", near, dtype=s.dtype)
    away = compute(f"{mean}_away", "sub", x, near, dtype=s.dtype)
    square = compute(f"{mean}_square", "mul", away, away, dtype=s.dtype)
    raw, drift = total(f"{m2}_raw", square), total(f"{mean}_drift", away)
    off = compute(f"{mean}_off", "div", drift, n)
    if blocks:
        again = compute(f"{mean}_again", "cast", near)
        compute(mean, "cast", compute(f"{mean}_exact", "add", again, off), dtype=s.dtype)
        # Reuse `away` for other readers of x - mean.
        rest = compute(f"{mean}_rest", "cast", off, dtype=s.dtype)
        compute(f"{mean}_centred", "sub", away, rest, dtype=s.dtype)
    apart = compute(f"{m2}_apart", "sub", raw, compute(f"{m2}_lost", "mul", drift, off))
    made.append(ir.Constant(f"{m2}_zero", 0.0, wide))
    # Squares of tiny numbers underflow to 0, below the rounding error.
    compute(m2, "cast", compute(f"{m2}_wide", "maximum", apart, f"{m2}_zero"), dtype=s.dtype)
    return made
