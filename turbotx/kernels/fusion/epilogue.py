"""Epilogues: merges a region that only finishes a GEMM's sums into the GEMM's launch.

In: the fused regions. Out: an `Epilogue` for each region that is a single chain from one linear:
bias, an activation, the product with the factor of a gated layer, a residual; for example::

    linear, [add, gelu]          ->  activation(linear + bias), "gelu"
    linear, [silu, mul] of halves ->  "silu", gated
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.expert_ops import grouped_linear
from turbotx.ir.expr import ONE, product
from turbotx.ir.quantized_ops import (
    KIND_NAMES,
    QUANTIZED_LINEARS,
    quantized_linear,
    weight_only_linear,
)
from turbotx.ir.strides import (
    Layout,
    has_plain_rows,
    layout_of,
    layout_with_copies,
    reshape_strides,
)
from turbotx.kernels.fusion.fuse import FusedRegion
from turbotx.passes.partition import Region, op_name, tensor_inputs

aten = torch.ops.aten
PACKABLE = (torch.float32, torch.bfloat16, torch.float16)
COMMUTES = frozenset({"add", "mul"})
X, FACTOR = "x", "factor"


def _sorted(op: str, *args: Any) -> tuple[Any, ...]:
    return (op, *sorted(args, key=repr)) if op in COMMUTES else (op, *args)


def _written_out_gelu() -> Any:
    inner = _sorted("add", X, _sorted("mul", ("pow", X, 3.0), 0.044715))
    tanh = ("tanh", _sorted("mul", inner, 0.7978845608028654))
    return _sorted("mul", _sorted("mul", X, 0.5), _sorted("add", tanh, 1.0))


# The nested calls of each activation of one value, as `_form` returns them.
FORMS: dict[Any, str] = {
    X: "none",
    ("relu", X): "relu",
    ("gelu", X, "none"): "gelu",
    ("gelu", X, "tanh"): "gelu_tanh",
    _written_out_gelu(): "gelu_tanh",
    ("silu", X): "silu",
    _sorted("mul", X, ("sigmoid", X)): "silu",
    ("tanh", X): "tanh",
}


@dataclass(frozen=True)
class Epilogue:
    """The ops that `linear`'s launch applies before it stores `output`: activation(linear + bias),
    times the second half of the columns if `gated`, plus `residual`. nodes: the calls that this
    replaces."""

    linear: fx.Node
    output: fx.Node
    nodes: tuple[fx.Node, ...]
    bias: fx.Node | None = None
    activation: str = "none"
    gated: bool = False
    residual: fx.Node | None = None

    @property
    def name(self) -> str:
        """The launch's name: linear_gelu, linear_silu_mul, linear_add, ..."""
        narrow = KIND_NAMES.get(g.dtype(g.operand(self.linear, 1)), "")
        names = {
            quantized_linear: f"linear_{narrow}",
            weight_only_linear: f"linear_{narrow}_weights",
        }
        parts = [names.get(self.linear.target) or op_name(self.linear)]
        parts.append(self.activation if self.activation != "none" else "")
        parts += ["mul" if self.gated else "", "add" if self.residual is not None else ""]
        return "_".join(part for part in parts if part)


def find_epilogues(
    fused: Sequence[FusedRegion], kinds: Mapping[fx.Node, str]
) -> dict[fx.Node, Epilogue]:
    """Return the epilogues by their linear. `kinds`: the kind of each node of the graph."""
    found: dict[fx.Node, Epilogue] = {}
    for f in fused:
        if len(f.region.outputs) != 1:
            continue
        for linear in packable_inputs(f, fused, kinds):
            epilogue = None if linear in found else match_epilogue(f.region, linear, kinds)
            if epilogue is not None:
                found[linear] = epilogue
                break
    return found


def packable_inputs(
    f: FusedRegion, fused: Sequence[FusedRegion], kinds: Mapping[fx.Node, str]
) -> list[fx.Node]:
    """Return the linears that a region may finish: those that no other region's kernels read.

    The last comes first: if there are two, the other one is the residual.
    """
    # Another kernel may recompute a value of this region.
    elsewhere = {n for other in fused if other is not f for k in other.kernels for n in k.operands}
    found = [n for n in f.region.inputs if n not in elsewhere and is_packable(n, kinds)]
    return found[::-1]


def match_epilogue(
    region: Region, linear: fx.Node, kinds: Mapping[fx.Node, str]
) -> Epilogue | None:
    """Match a region with one output as the epilogue of `linear`; None if it is anything else."""
    return _Match(region, linear, kinds).run()


def is_packable(node: fx.Node, kinds: Mapping[fx.Node, str]) -> bool:
    """Return whether the packed GEMM supports the product: a constant 2-d weight, or one per
    expert, and rows of x with one stride."""
    if not g.is_call(node, aten.linear.default, grouped_linear, *QUANTIZED_LINEARS):
        return False
    x, weight, bias = g.operand(node, 0), g.operand(node, 1), bias_of(node)
    if g.dtype(node) not in PACKABLE or len(g.shape(weight)) != (3 if is_grouped(node) else 2):
        return False
    if is_grouped(node):
        ends = layout_with_copies(g.operand(node, 2))
        if not ends.is_contiguous or ends.offset != 0:
            return False
    scale = g.operand(node, 3) if node.target in QUANTIZED_LINEARS else None
    for constant in (weight, bias, scale):
        if constant is None:
            continue
        layout = layout_of(constant)
        if (
            layout is None
            or kinds[layout.root] not in ("parameter", "hoisted")
            or not _is_fixed(layout)
        ):
            return False
        packed = constant is weight or (constant is scale and len(layout.shape) > 1)
        if not packed and layout.strides != (ONE,):
            return False
    layout = layout_with_copies(x)
    return bool(layout.shape) and has_plain_rows(layout)


def is_grouped(node: fx.Node) -> bool:
    """Return whether a product has one weight per expert."""
    return node.target is grouped_linear


def bias_of(node: fx.Node) -> fx.Node | None:
    """Return the bias that a product itself adds, None if it has none."""
    return None if is_grouped(node) else g.optional(node, 2)


def _is_fixed(layout: Layout) -> bool:
    """Return whether a node is the same part of a weight at all sizes: only then it is packed
    once."""
    return all(e.is_Integer for e in (*layout.shape, *layout.strides, layout.offset))


class _Match:
    """One attempt to match a region as the epilogue of one linear."""

    def __init__(self, region: Region, linear: fx.Node, kinds: Mapping[fx.Node, str]) -> None:
        self.region, self.linear, self.kinds = region, linear, kinds
        self.inside = set(region.nodes)
        self.seen: set[fx.Node] = set()
        self.base = linear  # the sums: the linear, or the linear plus its bias
        self.bias = bias_of(linear)

    def run(self) -> Epilogue | None:
        (output,) = self.region.outputs
        dtypes = {g.dtype(n) for n in self.region.nodes}
        own = g.dtype(self.linear)
        if not dtypes <= {own, torch.float32} or g.dtype(output) != own or not self._owned():
            return None
        self._take_bias()
        value, residual = self._split_residual(output)
        if is_grouped(self.linear) and (self.bias, residual) != (None, None):
            return None
        form = self._form(value)
        activation, gated = FORMS.get(form, ""), False
        match form:
            case ("mul", gate, "factor") | ("mul", "factor", gate):
                activation, gated = FORMS.get(gate, ""), True
        width = g.shape(self.linear)[-1] / (2 if gated else 1)
        if not activation or self.seen != self.inside or g.shape(output)[-1] != width:
            return None
        nodes = (self.linear, *self.region.nodes)
        return Epilogue(self.linear, output, nodes, self.bias, activation, gated, residual)

    def _owned(self) -> bool:
        """Return whether only the region reads the linear."""
        readers: list[fx.Node] = []
        views = [self.linear]
        while views:
            for user in views.pop().users:
                (views if self.kinds[user] == "view" else readers).append(user)
        return all(r in self.inside or self.kinds[r] == "size" for r in readers)

    def _take_bias(self) -> None:
        """Set the sums to linear + bias, if that is the first op."""
        for node in self.region.nodes:
            if self.bias is not None or not _is_sum(node):
                continue
            a, b = g.operand(node, 0), g.operand(node, 1)
            for value, bias in ((a, b), (b, a)):
                if self._leaf(value) == X and self._is_bias(bias):
                    self.base, self.bias = node, bias
                    self.seen.add(node)
                    return

    def _is_bias(self, node: Any) -> bool:
        if not g.is_tensor(node) or g.shape(node) != g.shape(self.linear)[-1:]:
            return False
        layout = layout_of(node)
        if layout is None or self.kinds[layout.root] not in ("parameter", "hoisted"):
            return False
        return layout.strides == (ONE,) and g.dtype(node) == g.dtype(self.linear)

    def _split_residual(self, output: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        """Match value + residual, where the residual is a tensor of the output's size in memory."""
        if not _is_sum(output) or output is self.base:
            return output, None
        a, b = g.operand(output, 0), g.operand(output, 1)
        for value, other in ((a, b), (b, a)):
            layout = layout_of(other) if g.is_tensor(other) else None
            if layout is None or layout.root in (self.linear, *self.inside):
                continue
            whole = product(g.shape(layout.root)) == product(layout.shape) and layout.is_contiguous
            if (
                whole
                and layout.shape == g.shape(output)
                and g.dtype(layout.root) == g.dtype(output)
            ):
                self.seen.add(output)
                return value, other
        return output, None

    def _leaf(self, node: Any) -> str | None:
        """Return X for an unchanged view of the sums, or for the first half of a gated layer's
        columns; FACTOR for the second half."""
        layout = layout_of(node) if g.is_tensor(node) else None
        if layout is None or layout.root is not self.base:
            return None
        width, columns = g.shape(self.linear)[-1], layout.shape[-1:]
        if layout.is_contiguous and columns == (width,):
            return X
        rows = reshape_strides(layout, (product(layout.shape[:-1]), *columns))
        if not columns or 2 * columns[0] != width or rows is None or rows != (width, ONE):
            return None
        return {0: X, columns[0]: FACTOR}.get(layout.offset)

    def _form(self, node: Any) -> Any:
        """Return how a value is computed from the sums, as nested calls; None for anything else."""
        if not isinstance(node, fx.Node):
            return float(node) if isinstance(node, (int, float)) else repr(node)
        leaf = self._leaf(node)
        if leaf is not None:
            return leaf
        layout = layout_of(node) if g.is_tensor(node) else None
        if layout is None or layout.root not in self.inside or not layout.is_contiguous:
            return None
        root = layout.root
        self.seen.add(root)
        if root.target is aten._to_copy.default and set(root.kwargs) == {"dtype"}:
            return self._form(root.args[0])  # sums are float32 until they are stored
        extra = [v for k, v in root.kwargs.items() if k != "approximate"]
        if extra or layout.shape[-1:] != g.shape(root)[-1:]:
            return None
        args = [self._form(a) for a in root.args]
        if root.target is aten.gelu.default:
            args = [args[0], g.argument(root, "approximate")]
        return _sorted(op_name(root), *args)


def _is_sum(node: fx.Node) -> bool:
    return g.is_call(node, aten.add.Tensor) and len(tensor_inputs(node)) == 2 and not node.kwargs
