"""The op table: one row per ATen op, defining the element of its result at an index.

In: an ATen overload. Out: its row, which the scalarizer calls for one element of the op's result. A
pointwise row is a function of its arguments' elements; an indexed row also gets the index, and may
read its inputs anywhere or reduce over them. To add an op, add a row::

    pointwise("aten.silu.default", lambda b, x: x * b.sigmoid(x))
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from turbotx.ir import fx_nodes as g
from turbotx.ir.printer import SHORT


@dataclass(frozen=True)
class Row:
    """One op: `kind` is "pointwise" or "indexed".

    rule: for a pointwise row, takes (builder, *arguments) with tensors as elements in the compute
    dtype; for an indexed one, (builder, node, index). The builder is a `Scalarizer`.
    as_is: positions of arguments that are not promoted.
    reduces: whether it reduces over an axis.
    jumps: whether its result may be another where an argument is off by a rounding.
    """

    kind: str
    rule: Callable[..., Any]
    as_is: tuple[int, ...] = ()
    reduces: bool = False
    jumps: bool = False


OPS: dict[Any, Row] = {}

OF_NUMBERS: dict[Any, str] = {
    operator.truediv: "div", operator.mul: "mul", operator.add: "add", operator.sub: "sub",
    operator.pow: "pow", operator.neg: "neg", torch.sym_float: "", torch.sym_sqrt: "sqrt",
}  # fmt: skip
"""How kernels compute floats made of sizes, in double: the primitive, "" for a conversion."""


def _resolve(overload: str) -> Any | None:
    namespace, packet, name = overload.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet, None), name, None)


def pointwise(
    overloads: str, rule: Callable[..., Any], as_is: tuple[int, ...] = (), jumps: bool = False
) -> None:
    """Add a row for each of the space-separated overloads that this version of torch has."""
    for overload in overloads.split():
        target = _resolve(overload)
        if target is not None:
            OPS[target] = Row("pointwise", rule, as_is, jumps=jumps)


def indexed(overloads: str, rule: Callable[..., Any], reduces: bool = False) -> None:
    """Add a row whose rule takes the node and the index."""
    for overload in overloads.split():
        target = _resolve(overload)
        if target is not None:
            OPS[target] = Row("indexed", rule, reduces=reduces)


def is_computed(node: Any) -> bool:
    """Return whether a kernel can compute this fx node, by a row of the table."""
    if not g.is_tensor(node) or node.op != "call_function" or node.target not in OPS:
        return False
    sources = node.all_input_nodes
    if not all(is_stored(n, node.target) for n in (node, *sources) if g.is_tensor(n)):
        return False
    return all(g.is_tensor(n) or is_number_computed(n) for n in sources)


def is_stored(node: Any, target: Any) -> bool:
    """Return whether kernels that compute `target` read and write numbers of a node's dtype: none
    do complex ones and unsigned ones of more than 8 bits, and only turbotx's own ops float8."""
    dtype = g.dtype(node)
    own = getattr(target, "namespace", "turbotx") == "turbotx"
    return dtype in SHORT and (own or dtype is not torch.float8_e4m3fn)


def is_number_computed(node: Any) -> bool:
    """Return whether a kernel can compute a float made of sizes; integer sizes are passed to it."""
    if not isinstance(node.meta.get("val"), (float, torch.SymFloat)):
        return True
    return node.target in OF_NUMBERS and all(map(is_number_computed, node.all_input_nodes))
