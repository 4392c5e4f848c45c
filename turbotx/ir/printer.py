"""Prints a kernel as text, for `turbotx compile` and the golden tests.

In: an `ir.Kernel`. Out: a few readable lines, for example::

    fused_gelu(linear: in f32[batch, seq, 1536], bias: in f32[1536], gelu: out f32[...])
      for row in batch*seq, col in 1536
        x = linear[1536*row + col]
"""

from __future__ import annotations

import torch

from turbotx import ir
from turbotx.ir.expr import Expr

SHORT = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "bool",
    torch.float8_e4m3fn: "f8",
}  # fmt: skip


def show_expr(value: Expr) -> str:
    """Return a size expression as text, without the markers of loop indices and gathered values."""
    return str(value).replace("@", "").replace("%", "")


def show_shape(shape: tuple[Expr, ...]) -> str:
    """Return a shape as text: "[batch, seq, 384]"."""
    return "[" + ", ".join(show_expr(e) for e in shape) + "]"


def show_statement(s: ir.Statement) -> str:
    """Return one statement as one line."""
    if isinstance(s, ir.Load):
        mask = f" if {s.access.mask}" if s.access.mask else ""
        return f"{s.result} = {s.access.param}[{show_expr(s.access.offset)}]{mask}"
    if isinstance(s, ir.Store):
        mask = f" if {s.access.mask}" if s.access.mask else ""
        return f"{s.access.param}[{show_expr(s.access.offset)}] = {s.value}{mask}"
    if isinstance(s, ir.Index):
        return f"{s.result} = {show_expr(s.value)}"
    if isinstance(s, ir.Constant):
        return f"{s.result} = {s.value!r} as {SHORT[s.dtype]}"
    if isinstance(s, ir.Check):
        mask = f" if {s.mask}" if s.mask else ""
        return f"check 0 <= {s.value} < {show_expr(s.limit)}{mask}"
    if isinstance(s, ir.Reduce):
        return f"{', '.join(s.results)} = reduce {s.op}({', '.join(s.args)})"
    if isinstance(s, ir.Scan):
        return f"{s.result} = scan {s.op}({', '.join(s.args)})"
    kind = f" as {SHORT[s.dtype]}" if s.op == "cast" else ""
    return f"{s.result} = {s.op}({', '.join(s.args)}){kind}"


def show_kernel(kernel: ir.Kernel) -> str:
    """Return the whole kernel as text."""
    params = ", ".join(
        f"{p.name}: {p.role} {SHORT[p.dtype]}{show_shape(p.shape)}" for p in kernel.params
    )
    loops = ", ".join(f"{a.name} in {show_expr(a.extent)}" for a in kernel.rows)
    columns = ", ".join(f"{a.name} in {show_expr(a.extent)}" for a in kernel.columns)
    head = f"  for {loops}" if loops else "  once"
    head += f", reduced over {columns}" if columns else ""
    lines = [f"{kernel.name}({params})", head]
    return "\n".join(lines + [f"    {show_statement(s)}" for s in kernel.body])
