"""Known values: constant element values that follow from the mask.

In: a graph and its mask input. Out: the constant value of elements whose token is masked (mask 0),
or not masked (mask 1), if it follows from the graph; otherwise None. For example::

    known.hidden(where(mask == 0, -inf, x))  ->  -inf        known.shown(mask.to(bool))  ->  True
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.kernel import Index
from turbotx.ir.views import VIEWS
from turbotx.ops import OPS
from turbotx.ops.scalarizer import follow
from turbotx.passes.operands import number_in

aten = torch.ops.aten
_AND = (aten.bitwise_and.Tensor, aten.logical_and.default, aten.mul.Tensor)
_SAME = frozenset({*VIEWS, aten.index.Tensor, aten.clone.default, aten.contiguous.default})


class KnownValues:
    """Constant propagation from a mask.

    mask: an input of 0 (masked token) and 1.
    """

    def __init__(self, mask: fx.Node) -> None:
        self.mask = mask
        zero, one = (torch.tensor(n, dtype=g.dtype(mask)).item() for n in (0, 1))
        self._hidden: dict[fx.Node, Any] = {mask: zero}
        self._shown: dict[fx.Node, Any] = {mask: one}

    def hidden(self, node: Any) -> Any:
        """Return the constant value of elements whose token is masked; None if unknown.

        A product with 0 counts as 0: models with NaN or infinity in padded positions are not
        supported.
        """
        return find_number(node, self._hidden)

    def shown(self, node: Any) -> Any:
        """Return the constant value of elements whose token is not masked; None if unknown."""
        return find_number(node, self._shown)

    @staticmethod
    def counts_along(node: fx.Node) -> int | None:
        """Return the dim (negative) along which a tensor holds 0, 1, ...; None for other
        tensors."""
        scalarizer, places, element = follow(node)
        name = None if element is None else element.name
        for s in scalarizer.body:
            if isinstance(s, Index) and s.result == name and s.value in places:
                return places.index(s.value) - len(places)
        return None


def find_number(node: Any, known: dict[fx.Node, Any]) -> Any:
    """Return the constant value of all elements of a node, given constants of other nodes; None if
    unknown. Adds results to `known`."""
    if isinstance(node, (bool, int, float)):
        return node
    if not isinstance(node, fx.Node) or not g.is_tensor(node):
        return None
    if node not in known:
        known[node] = _compute(node, known)
    return known[node]


def _compute(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    if node.op != "call_function":
        return None
    made = number_in(node)
    if made is not None:
        return made
    if node.target in (aten.full_like.default, aten.full.default):
        return node.args[1] if isinstance(node.args[1], (bool, int, float)) else None
    if node.target in _SAME:
        return find_number(node.args[0], known)
    row = OPS.get(node.target)
    if row is None or row.kind != "pointwise":
        return None
    values = [find_number(a, known) for a in node.args]
    if node.target is aten.where.self and isinstance(values[0], bool):
        return values[1] if values[0] else values[2]
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor) and values[1] in (0, 1):
        return values[2] if values[1] else values[0]
    if node.target in _AND and 0 in values:
        return False if g.dtype(node) is torch.bool else 0
    if None in values:
        return None
    return _evaluate(node, values)


def _evaluate(node: fx.Node, values: list[Any]) -> Any:
    """Evaluate an op on constants, each in the dtype that it has in the graph."""
    target: Any = node.target
    args = [
        torch.tensor(v, dtype=g.dtype(a)) if isinstance(a, fx.Node) else v
        for a, v in zip(node.args, values, strict=True)
    ]
    if any(isinstance(n, fx.Node) for n in node.kwargs.values()):
        return None
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("device", "layout", "pin_memory")}
    with torch.no_grad():
        return target(*args, **kwargs).item()
