"""GEMMs: the launch of one product with its epilogue.

In: a linear, or a grouped linear of experts, with its epilogue, and the operands of nodes. Out: the
launch, with the equivalent PyTorch call, for example::

    linear(x, w) + b, gelu  ->  GemmLaunch(GemmKernel("gelu"), x, w, b, out, rows=batch*seq, ...)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import fx

from turbotx import ir
from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import product
from turbotx.ir.int4_ops import quantize_groups
from turbotx.ir.matmul_kernels import GemmKernel
from turbotx.ir.quantized_ops import QUANTIZED_LINEARS, weight_only_linear
from turbotx.ir.strides import layout_with_copies, reshape_strides
from turbotx.kernels.fusion.epilogue import Epilogue, is_grouped
from turbotx.passes.extract import extract

aten = torch.ops.aten


def make_gemm(
    end: Epilogue, operand: Callable[[fx.Node], ir.Operand], out: ir.Operand,
    place: Mapping[str, Any],
) -> ir.GemmLaunch | ir.GroupedGemmLaunch:  # fmt: skip
    """Return the launch of `end.linear` that writes `out`.

    operand: maps a node to its window.
    place: the launch's name and origin.
    """
    node = end.linear
    x, weight = operand(g.operand(node, 0)), operand(g.operand(node, 1))
    rows, depth = product(x.shape[:-1]), x.shape[-1]
    flat = reshape_strides(layout_with_copies(g.operand(node, 0)), (rows, depth))
    assert flat is not None
    stride = flat[0] if rows != 1 else depth
    kernel, call = GemmKernel(end.activation, end.gated), _call(end, operand, out)
    if is_grouped(node):
        ends = operand(g.operand(node, 2))
        return ir.GroupedGemmLaunch(kernel, x, weight, ends, out, rows, stride, call, **place)
    given = (end.bias, end.residual, *scales_of(node))
    bias, residual, down, across = (None if n is None else operand(n) for n in given)
    floats, made = node.target is weight_only_linear, g.operand(node, 1)
    group = cast(int, made.args[2]) if g.is_call(made, quantize_groups) else 0
    inplace: tuple[tuple[str, str], ...] = ()
    if residual is not None and residual.tensor != x.tensor:
        inplace = ((out.tensor, residual.tensor),)
    return ir.GemmLaunch(
        kernel, x, weight, bias, out, residual, rows, stride, call, **place, inplace=inplace,
        int8=None if down is None else ir.Int8Operands(down, across, floats, group),
    )  # fmt: skip


def scales_of(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """Return the scales of an int8 weight and of int8 rows, None for each that is absent."""
    if node.target not in QUANTIZED_LINEARS:
        return None, None
    return g.operand(node, 3), g.optional(node, 4)


def _call(
    end: Epilogue, operand: Callable[[fx.Node], ir.Operand], out: ir.Operand
) -> ir.AtenCall:  # fmt: skip
    """Return the PyTorch call that is equivalent to the launch."""
    node, target = end.linear, cast(Any, end.linear.target)
    if end.output is node:
        args = [operand(n) if isinstance(n, fx.Node) else n for n in node.args]
        return ir.AtenCall(
            target, tuple(args), {}, (out,), has_out=node.target is aten.linear.default
        )
    named = (*node.all_input_nodes, end.bias, end.residual)
    given = list(dict.fromkeys(n for n in named if n is not None))
    meant = extract([end.output], given, end.name)
    reads = [operand(n) for n in given]
    return ir.AtenCall(meant.module, (*reads, *meant.sizes), {}, (out,))
