"""Assembly: launches and named tensors of a program, before it is bound to parameters and memory.

In: nothing. Out: tensors by name, launches in order, and the outputs, for example::

    assembly.outputs  ->  [Operand("layer_norm_24", ...), Alias("input_ids", ())]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from turbotx import ir
from turbotx.capture.result_layouts import Alias
from turbotx.ir.expr import ZERO, Expr
from turbotx.ir.strides import Layout, contiguous_strides, root_layout
from turbotx.kernels.fusion.epilogue import Epilogue
from turbotx.kernels.fusion.fuse import FusedRegion


@dataclass
class Assembly:
    """A program before linking.

    outputs: for each leaf of the model's output an Operand, an `Alias` of an input or parameter, a
    constant or a size expression.
    externs: ops that run through ATen, with the reason.
    raw: inputs that must be dense, since their layout is queried or read through explicit strides;
    and whether the strides of their dims of size 1 must be those of a dense tensor too.
    orders: by input, the order in which its dims lie in memory, None for contiguous.
    """

    tensors: dict[str, ir.Tensor] = field(default_factory=dict)
    launches: list[ir.Launch] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    requirements: list[tuple[Expr, str]] = field(default_factory=list)
    hoisted: dict[str, fx.Node] = field(default_factory=dict)
    externs: list[tuple[str, str]] = field(default_factory=list)
    raw: dict[str, bool] = field(default_factory=dict)
    orders: dict[str, tuple[int, ...] | None] = field(default_factory=dict)

    @property
    def returned(self) -> list[str]:
        """The tensors that are returned, or of which views are returned."""
        named = {ir.Operand: "tensor", Alias: "root"}
        return [getattr(x, named[type(x)]) for x in self.outputs if type(x) in named]


@dataclass(frozen=True)
class Assembled:
    """An assembly with the regions it was made from and the epilogues by linear."""

    assembly: Assembly
    fused: Sequence[FusedRegion]
    epilogues: Mapping[fx.Node, Epilogue]


def dense(tensor: ir.Tensor) -> ir.Operand:
    """Return an operand that covers a contiguous tensor."""
    strides = contiguous_strides(tensor.shape)
    return ir.Operand(tensor.name, tensor.dtype, tensor.shape, strides, ZERO)


def over(layout: Layout, dtype: torch.dtype) -> ir.Operand:
    """Return an operand over the part of its root that a layout shows."""
    return ir.Operand(layout.root.name, dtype, layout.shape, layout.strides, layout.offset)


def whole(node: fx.Node, tensor: ir.Tensor) -> ir.Operand:
    """Return an operand that covers a node's tensor: contiguous, or a parameter with its own
    strides."""
    strides = root_layout(node).strides if node.op == "get_attr" else None
    return dense(tensor) if strides is None else replace(dense(tensor), strides=strides)
