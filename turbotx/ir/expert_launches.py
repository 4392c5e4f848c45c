"""Launches of a mixture of experts: a grouped product, and the sorting of rows by expert.

In: nothing; these are types like those of `ir.launch`. Out, for example::

    GroupedGemmLaunch(GemmKernel("silu", gated=True), x, weight, ends, out, rows=2*batch*seq, ...)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sympy import Integer

from turbotx.ir.expr import Expr
from turbotx.ir.launch import AtenCall, Launch, Operand
from turbotx.ir.matmul_kernels import ACTIVATIONS, GemmKernel


@dataclass(frozen=True)
class GroupedGemmLaunch(Launch):
    """out = epilogue(x weight[e]^T) for the rows of each expert e.

    x: (rows, k) with a row stride of `x_stride` elements.
    weight: (experts, n, k).
    ends: int32 (experts,), where each expert's rows end; rows after the last end are zero.
    call: the equivalent PyTorch call.
    """

    kind = "gemm"
    bias: ClassVar[None] = None
    residual: ClassVar[None] = None
    norm: ClassVar[None] = None

    gemm: GemmKernel
    x: Operand
    weight: Operand
    ends: Operand
    out: Operand
    rows: Expr
    x_stride: Expr
    call: AtenCall

    @property
    def width(self) -> Expr:
        """Number of columns stored."""
        return self.out.shape[-1]

    @property
    def operands(self) -> tuple[Operand, ...]:
        """x, weight, ends and out."""
        return self.x, self.weight, self.ends, self.out

    @property
    def sizes(self) -> tuple[Expr, ...]:
        """Rows, stride of x, width of the output, and the activation's index."""
        activation = Integer(ACTIVATIONS.index(self.gemm.activation))
        return self.rows, self.x_stride, self.width, activation

    @property
    def writes(self) -> tuple[str, ...]:
        """The name of the output."""
        return (self.out.tensor,)


@dataclass(frozen=True)
class RouteLaunch(Launch):
    """Sorts rows by expert, see `ir.expert_ops.route`.

    chosen: int64 (rows,), dense.
    call: the equivalent PyTorch call.
    """

    kind = "route"

    chosen: Operand
    order: Operand
    place: Operand
    ends: Operand
    call: AtenCall

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The experts chosen, then the three results."""
        return self.chosen, self.order, self.place, self.ends

    @property
    def sizes(self) -> tuple[Expr, ...]:
        """Number of rows and of experts."""
        return self.chosen.shape[0], self.ends.shape[0]

    @property
    def writes(self) -> tuple[str, ...]:
        """The names of the three results."""
        return self.order.tensor, self.place.tensor, self.ends.tensor
