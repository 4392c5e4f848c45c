"""Sequential: write the single-pass reductions as the steps that a processor takes.

In: a kernel whose reductions may be tuples (mean and m2, largest and total). Out: the same
function over plain sums, maxima and so on: a row lies in the first-level cache while it is worked
on, so a second look at it costs no memory traffic, and no accuracy is lost::

    mean, m2 = welford(x)  ->  mean = sum(x) / n;  m2 = sum((x - mean)**2) - sum(x - mean)**2 / n
"""

from __future__ import annotations

from dataclasses import replace

from turbotx import ir
from turbotx.sizes import product


def make_sequential(kernel: ir.Kernel) -> ir.Kernel:
    """Return the kernel with every tuple reduction taken apart; equal values stay one."""
    body: list[ir.Statement] = []
    known: dict[tuple[str, tuple[str, ...]], str] = {}
    renamed: dict[str, str] = {}

    def compute(result: str, op: str, args: tuple[str, ...], dtype: object) -> str:
        key = (op, args)
        if key not in known:
            known[key] = result
            body.append(ir.Compute(result, op, args, dtype))  # type: ignore[arg-type]
        return known[key]

    for s in kernel.body:
        s = _rename(s, renamed)
        if isinstance(s, ir.Compute):
            name = compute(s.result, s.op, s.args, s.dtype) if s.op != "cast" else s.result
            if s.op == "cast":
                body.append(s)
            elif name != s.result:
                renamed[s.result] = name
        elif isinstance(s, ir.Reduce) and s.op == "welford":
            mean, m2 = s.results
            (x,) = s.args
            total, count, size = f"{mean}_total", f"{mean}_count", f"{mean}_size"
            body.append(ir.Reduce((total,), "sum", (x,), s.dtype))
            body.append(ir.Index(size, product([a.extent for a in kernel.columns])))
            body.append(ir.Compute(count, "cast", (size,), s.dtype))
            compute(mean, "div", (total, count), s.dtype)
            away = compute(f"{mean}_away", "sub", (x, mean), s.dtype)
            square = compute(f"{mean}_square", "mul", (away, away), s.dtype)
            # The mean is rounded; what the deviations add up to tells by how much.
            raw, drift = f"{m2}_raw", f"{mean}_drift"
            body.append(ir.Reduce((raw,), "sum", (square,), s.dtype))
            body.append(ir.Reduce((drift,), "sum", (away,), s.dtype))
            lost = compute(f"{drift}_lost", "mul", (drift, drift), s.dtype)
            share = compute(f"{drift}_share", "div", (lost, count), s.dtype)
            compute(m2, "sub", (raw, share), s.dtype)
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


def _rename(s: ir.Statement, renamed: dict[str, str]) -> ir.Statement:
    if isinstance(s, (ir.Compute, ir.Reduce, ir.Scan)):
        return replace(s, args=tuple(renamed.get(a, a) for a in s.args))
    if isinstance(s, (ir.Load, ir.Store)) and s.access.mask in renamed:
        s = replace(s, access=replace(s.access, mask=renamed[s.access.mask]))
    if isinstance(s, ir.Store):
        return replace(s, value=renamed.get(s.value, s.value))
    return s
