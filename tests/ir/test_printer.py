"""Kernels as text: what `turbotx compile` dumps says what the kernel does.

In: functions fused into one kernel. Out: its text, word for word.
"""

from __future__ import annotations

import sympy
import torch
from expecttest import assert_expected_inline

import turbotx
from turbotx import ir
from turbotx.ir.printer import show_expr, show_statement


def shown(function: object, *inputs: torch.Tensor) -> str:
    report = turbotx.explain(turbotx.optimize(function, backend="aten"), *inputs)
    return "\n\n".join(k.signature for k in report.kernels)


def test_a_pointwise_kernel() -> None:
    text = shown(lambda x, y: (x + y).relu(), torch.randn(2, 3), torch.randn(2, 3))
    assert_expected_inline(
        text,
        """\
fused_add_relu(x: in f32[batch, seq], y: in f32[batch, seq], relu: out f32[batch, seq])
  for col in batch*seq
    x_ = x[col]
    x1 = y[col]
    add = add(x_, x1)
    c = 0.0 as f32
    maximum = maximum(add, c)
    relu[col] = maximum""",
    )


def test_a_reduction() -> None:
    text = shown(lambda x: x.sum(-1), torch.randn(2, 3))
    assert_expected_inline(
        text,
        """\
fused_sum(x: in f32[batch, seq], sum: out f32[batch])
  for row in batch, reduced over col in seq
    x_ = x[col + row*seq]
    sum_ = reduce sum(x_)
    sum[row] = sum_""",
    )


def test_every_statement_is_one_line() -> None:
    access = ir.Access("x", 2 * ir.axis_symbol("row") + ir.value_symbol("v1"), "ok")
    f32 = torch.float32
    statements = [
        ir.Load("v0", access, f32),
        ir.Index("v1", ir.axis_symbol("row") + 1),
        ir.Constant("v2", 0.5, f32),
        ir.Compute("v3", "add", ("v0", "v2"), f32),
        ir.Compute("v4", "cast", ("v3",), torch.bfloat16),
        ir.Reduce(("v5",), "sum", ("v3",), f32),
        ir.Check("v1", sympy.Integer(10), None),
        ir.Store(ir.Access("out", ir.axis_symbol("row")), "v5"),
    ]
    assert_expected_inline(
        "\n".join(map(show_statement, statements)),
        """\
v0 = x[v1 + 2*row] if ok
v1 = row + 1
v2 = 0.5 as f32
v3 = add(v0, v2)
v4 = cast(v3) as bf16
v5 = reduce sum(v3)
check 0 <= v1 < 10
out[row] = v5""",
    )


def test_symbols_lose_their_marks() -> None:
    assert show_expr(ir.axis_symbol("row") * 3) == "3*row"
