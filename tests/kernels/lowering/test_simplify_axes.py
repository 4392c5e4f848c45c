"""Tidying a kernel and taking its tuple reductions apart, on hand-made kernels."""

from __future__ import annotations

import sympy
import torch

from tests.kernel_interpreter import interpret
from turbotx import ir
from turbotx.ir.expr import dim
from turbotx.kernels.cpp.sequential import make_sequential
from turbotx.kernels.lowering.simplify_axes import drop_dead, merge_axes, tidy

B, S, H = dim("batch"), dim("seq"), sympy.Integer(8)
b, s, h = (ir.axis_symbol(n) for n in ("a0", "a1", "a2"))
F32 = torch.float32
DENSE = b * S * 8 + s * 8 + h


def kernel(
    load: sympy.Expr, store: sympy.Expr, *extra: ir.Statement, row: bool = False
) -> ir.Kernel:
    axes = (
        ir.Axis("a0", B),
        ir.Axis("a1", S),
        ir.Axis("a2", H, ir.REDUCTION if row else ir.PARALLEL),
    )
    params = (ir.Param("x", F32, (B, S, H), "in"), ir.Param("y", F32, (B, S, H), "out"))
    body = (
        ir.Load("v", ir.Access("x", load), F32),
        *extra,
        ir.Compute("w", "neg", ("v",), F32),
        ir.Store(ir.Access("y", store), "w"),
    )
    return ir.Kernel("k", params, axes, body)


def extents(k: ir.Kernel) -> list[sympy.Expr]:
    return [a.extent for a in k.axes]


def test_dense_axes_merge_into_one() -> None:
    assert extents(merge_axes(kernel(DENSE, DENSE))) == [8 * B * S]


def test_a_row_axis_never_merges_with_a_parallel_one() -> None:
    assert extents(merge_axes(kernel(DENSE, DENSE, row=True))) == [B * S, 8]


def test_a_transpose_keeps_its_axes() -> None:
    turned = s * B * 8 + b * 8 + h
    assert extents(merge_axes(kernel(DENSE, turned))) == [B, S, 8]


def test_a_broadcast_keeps_its_axis() -> None:
    assert extents(merge_axes(kernel(s * 8 + h, DENSE))) == [B, 8 * S]


def test_tidy_names_from_the_innermost_out_and_drops_what_nothing_reads() -> None:
    dead = ir.Compute("unused", "exp", ("v",), F32)
    tidied, params = tidy(kernel(DENSE, s * B * 8 + b * 8 + h, dead))
    assert [a.name for a in tidied.axes] == ["row1", "row", "col"]
    assert params == {"x", "y"}
    assert "unused" not in {r for st in tidied.body for r in ir.results_of(st)}
    assert tidy(tidied)[0] == tidied


def test_a_check_lives_as_long_as_its_value() -> None:
    index = ir.Load("i", ir.Access("x", b), torch.int64)
    checked = kernel(DENSE, DENSE, index, ir.Check("i", S))
    assert not [st for st in drop_dead(checked).body if isinstance(st, ir.Check)]


def test_tidying_changes_no_value() -> None:
    x = torch.randn(2, 3, 8)
    dims = {"batch": 2, "seq": 3}
    for k in (kernel(DENSE, DENSE), kernel(s * 8 + h, DENSE), kernel(DENSE, s * B * 8 + b * 8 + h)):
        before, after = (interpret(i, {"x": x}, dims)["y"] for i in (k, tidy(k)[0]))
        assert torch.equal(before, after)


def reducing(op: str) -> ir.Kernel:
    params = (ir.Param("x", F32, (B, H), "in"), ir.Param("p", F32, (B,), "out"),
              ir.Param("q", F32, (B,), "out"))  # fmt: skip
    body = (
        ir.Load("v", ir.Access("x", b * 8 + h), F32),
        ir.Reduce(("p1", "q1"), op, ("v",), F32),
        ir.Store(ir.Access("p", b), "p1"),
        ir.Store(ir.Access("q", b), "q1"),
    )
    return ir.Kernel("k", params, (ir.Axis("a0", B), ir.Axis("a2", H, ir.REDUCTION)), body)


def test_sequential_reductions_are_plain_and_mean_the_same() -> None:
    x = torch.randn(5, 8)
    for op in ("welford", "softmax"):
        k = reducing(op)
        plain = make_sequential(k)
        assert {st.op for st in plain.body if isinstance(st, ir.Reduce)} <= {"sum", "max"}
        before, after = (interpret(i, {"x": x}, {"batch": 5}) for i in (k, plain))
        for name in ("p", "q"):
            torch.testing.assert_close(before[name], after[name], rtol=1e-12, atol=1e-12)
