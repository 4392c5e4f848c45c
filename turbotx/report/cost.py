"""Cost: the bytes a launch has to move and the operations it has to do, as formulas in the dims.

In: an `ir.Launch`. Out: its `Cost`. An element that a launch needs is counted once, whatever the
kernel does; a gather counts what it picks, at most the whole table. For a bias and GELU::

    Cost(reads=6144*batch*seq + 6144, writes=6144*batch*seq, flops=0)
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from turbotx import ir
from turbotx.kernels.cpp_attention import AttentionKernel
from turbotx.kernels.traffic import kernel_traffic
from turbotx.sizes import ZERO, Expr, product


@dataclass(frozen=True)
class Cost:
    """Bytes read, bytes written and floating-point operations of one launch."""

    reads: Expr
    writes: Expr
    flops: Expr


def launch_cost(launch: ir.Launch) -> Cost:
    """Return what one launch has to move and compute."""
    if isinstance(launch.target, ir.Kernel):
        traffic = kernel_traffic(launch.target)
        return Cost(traffic.read_nbytes, traffic.written_nbytes, ZERO)
    windows = {a.tensor: _operand_nbytes(a) for a in launch.args if a}
    written = {name: n for name, n in windows.items() if name in launch.writes}
    read = {name: n for name, n in windows.items() if name not in launch.writes}
    if isinstance(launch.target, AttentionKernel):
        read = _add_windows(launch)
    return Cost(_total(read.values()), _total(written.values()), _flops(launch))


def _operand_nbytes(operand: ir.Operand) -> Expr:
    """The bytes that a window shows, an axis of stride 0 counted once."""
    extents = [e for e, s in zip(operand.shape, operand.strides, strict=True) if s != 0]
    return product(extents) * operand.dtype.itemsize


def _add_windows(launch: ir.Launch) -> dict[str, Expr]:
    """Q, K and V are often three windows on one packed tensor: all of them count."""
    found: dict[str, Expr] = {}
    for arg in launch.args:
        if arg is not None and arg.tensor not in launch.writes:
            found[arg.tensor] = found.get(arg.tensor, ZERO) + _operand_nbytes(arg)
    return found


def _flops(launch: ir.Launch) -> Expr:
    if launch.kind == "gemm":
        x, _, _, out = launch.args
        assert x is not None and out is not None
        return 2 * product(out.shape) * x.shape[-1]
    if isinstance(launch.target, AttentionKernel):
        batch, heads, _, q_len, k_len = launch.sizes[:5]
        return 4 * batch * heads * q_len * k_len * launch.target.head_dim
    return ZERO


def _total(values: object) -> Expr:
    return sympy.expand(sum(values, ZERO))  # type: ignore[call-overload]
