"""Assembly: launches and named tensors of a program, before it is bound to parameters and memory.

In: nothing. Out: tensors by name, launches in order, and what a call returns, for example::

    assembly.outputs  ->  [Operand("layer_norm_24", ...), Alias("input_ids", ())]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from turbotx import ir
from turbotx.capture.eager import Alias
from turbotx.ir.expr import ZERO, Expr
from turbotx.ir.strides import contiguous_strides, root_layout
from turbotx.kernels.fusion.epilogue import Epilogue
from turbotx.kernels.fusion.fuse import FusedRegion


@dataclass
class Assembly:
    """A program before it is bound to any machine.

    outputs: per leaf of the model's output an Operand, an `Alias` of an input or a parameter, or a
    plain constant or size expression.
    externs: ops that run through ATen, with the reason. raw: inputs whose memory is read by strides
    of the call's own, so that they must be dense. orders: the order of an input's dims by which it
    is taken, None for its own.
    """

    tensors: dict[str, ir.Tensor] = field(default_factory=dict)
    launches: list[ir.Launch] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    requirements: list[tuple[Expr, str]] = field(default_factory=list)
    hoisted: dict[str, fx.Node] = field(default_factory=dict)
    externs: list[tuple[str, str]] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)
    orders: dict[str, tuple[int, ...] | None] = field(default_factory=dict)

    @property
    def returned(self) -> list[str]:
        """The tensors that the call returns, or views of which it returns."""
        named = {ir.Operand: "tensor", Alias: "root"}
        return [getattr(x, named[type(x)]) for x in self.outputs if type(x) in named]


@dataclass(frozen=True)
class Assembled:
    """An assembly, the regions that it was made of, and the epilogues by their linears."""

    assembly: Assembly
    fused: Sequence[FusedRegion]
    epilogues: Mapping[fx.Node, Epilogue]


def dense(tensor: ir.Tensor) -> ir.Operand:
    """Return the whole of a tensor that owns its memory."""
    strides = contiguous_strides(tensor.shape)
    return ir.Operand(tensor.name, tensor.dtype, tensor.shape, strides, ZERO)


def whole(node: fx.Node, tensor: ir.Tensor) -> ir.Operand:
    """Return the whole of a node's tensor: dense, or a parameter as its user has laid it out."""
    strides = root_layout(node).strides if node.op == "get_attr" else None
    return dense(tensor) if strides is None else replace(dense(tensor), strides=strides)
