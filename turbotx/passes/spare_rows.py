"""Spare rows: whether a packed graph may run with more batch rows or columns than its call has.

In: a packed graph. Out: which of the dims batch and columns may be larger: added rows do not change
the others, so that calls of many sizes share one CUDA graph::

    find_spare(graph, "batch", "seq")  ->  ("batch", "seq")

There is a rule per op; an op without one fixes the dim. No rule is shared with `pack`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx

from turbotx import ir
from turbotx.ir import fx_nodes as g
from turbotx.ir.attention_ops import along_diagonals
from turbotx.ir.expr import Expr, dim, product
from turbotx.ir.packed_ops import (
    packed_attention,
    sequence_cumsum,
    sequence_max,
    sequence_sum,
    sequence_token,
)
from turbotx.ir.quantized_ops import (
    quantize_rows,
    quantized_linear,
    row_scale,
    weight_only_linear,
)
from turbotx.ir.views import VIEWS, is_view
from turbotx.ops import OPS
from turbotx.ops.scalarizer import follow

aten = torch.ops.aten
OWN_INPUTS = ("bounds", "starts", "columns", "positions", "sequence_of")
"""The packed program's own inputs, which have exact sizes."""
PLACES = ("positions", "sequence_of")
"""Indices that count from the first row and never exceed the actual rows."""
_BY_BOUNDS = frozenset({packed_attention, sequence_sum, sequence_max, sequence_token,
                        sequence_cumsum})  # fmt: skip
_FILLS: dict[Any, int] = {
    aten.full.default: 0, aten.zeros.default: 0, aten.ones.default: 0, aten.new_full.default: 1,
    aten.new_zeros.default: 1, aten.new_ones.default: 1,
}  # fmt: skip
"""Index of the shape argument."""
_ALONG: dict[Any, str] = {
    aten.softmax.int: "dim", aten._softmax.default: "dim", aten.sum.dim_IntList: "dim",
    aten.mean.dim: "dim", aten.amax.default: "dim", aten.cat.default: "dim",
    aten.split_with_sizes.default: "dim", aten.unbind.int: "dim",
    aten.linalg_vector_norm.default: "dim",
}  # fmt: skip
"""Ops that work along dims, with the name of that argument."""
_ROWS: dict[Any, int] = {
    aten.linear.default: 0, aten.mm.default: 0, aten.matmul.default: 0, aten.addmm.default: 1,
    weight_only_linear: 0, row_scale: 0,
}  # fmt: skip
"""Products and other ops along each row, with the index of the operand whose rows may grow."""


def find_spare(graph: fx.Graph, batch: str, seq: str) -> tuple[str, ...]:
    """Return which of the two dims may be larger than a call's own."""
    return tuple(name for name in (batch, seq) if _Room(dim(name)).is_spare(graph))


class _Room:
    def __init__(self, symbol: sympy.Symbol) -> None:
        self.symbol = symbol

    def is_spare(self, graph: fx.Graph) -> bool:
        lines = _find_lines(graph)
        return all(self._node(node) for node in graph.nodes if node not in lines)

    def _varies(self, extent: Expr) -> bool:
        return self.symbol in extent.free_symbols

    def places(self, node: fx.Node) -> list[int]:
        """Return the dims of a tensor that may grow."""
        return [d for d, extent in enumerate(g.shape(node)) if self._varies(extent)]

    def _node(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return node.name in OWN_INPUTS or not self.places(node)
        if node.op == "output":
            leaves = [n for n in node.all_input_nodes if g.is_tensor(n)]
            sizes = [n for n in node.all_input_nodes if g.is_size(n)]
            whole = all(g.shape(n)[d] == self.symbol for n in leaves for d in self.places(n))
            return whole and not any(self._varies(g.size(n)) for n in sizes)
        if node.op != "call_function" or g.is_size(node):
            return True
        grown = [n for n in node.all_input_nodes if g.is_tensor(n) and self.places(n)]
        counted = [n for n in self._sizes(node.args) if self._varies(g.size(n))]
        makes = g.is_tensor(node) and bool(self.places(node))
        return not (grown or counted or makes) or self._is_apart(node, grown, bool(counted))

    def _sizes(self, args: Any) -> Iterator[fx.Node]:
        leaves = pytree.tree_leaves(args)
        return (n for n in leaves if isinstance(n, fx.Node) and g.is_size(n))

    def _is_apart(self, node: fx.Node, grown: list[fx.Node], counted: bool) -> bool:
        """Return whether an op treats each added row, and each other row, independently."""
        target: Any = node.target
        if target is g.GETITEM:
            return True  # its split was checked
        if target in _BY_BOUNDS:
            return target is packed_attention or not self.places(g.operand(node, 0))
        if target in _FILLS:
            rest = (*node.args[: _FILLS[target]], *node.args[_FILLS[target] + 1 :])
            return not any(self._varies(g.size(n)) for n in self._sizes(rest))
        if target is aten.arange.start_step:
            return all(isinstance(g.argument(node, n, 0), int) for n in ("start", "step"))
        if target is along_diagonals:
            return self._is_by_place(node)
        if VIEWS.get(target) == "reshape":
            return self._keeps_place(g.operand(node, 0), node)
        if target in (aten.expand.default, aten.permute.default, aten.transpose.int,
                      aten.unsqueeze.default, aten.squeeze.dims, aten.squeeze.dim,
                      aten.t.default, aten.alias.default):  # fmt: skip
            return True
        if counted and target is not aten.slice.Tensor:
            return False
        rule = self._rule(target)
        return rule is not None and rule(node, grown)

    def _rule(self, target: Any) -> Callable[[fx.Node, list[fx.Node]], bool] | None:
        row = OPS.get(target)
        likes = (aten.full_like.default, aten.zeros_like.default, aten.ones_like.default)
        if target in likes or (row is not None and row.kind == "pointwise"):
            return lambda node, grown: True
        if target in _ALONG:
            return self._is_along_others
        if target in _ROWS:
            return self._has_rows
        return {
            aten.slice.Tensor: self._is_whole, aten.select.int: self._is_whole,
            aten.layer_norm.default: self._normalizes, aten.rms_norm.default: self._normalizes,
            aten.index_select.default: self._looks_up, aten.index.Tensor: self._looks_up,
            aten.embedding.default: self._looks_up, quantize_rows: self._has_scaled_rows,
            quantized_linear: self._has_scaled_rows,
        }.get(target)  # fmt: skip

    def _is_by_place(self, node: fx.Node) -> bool:
        """Return whether an element, computed from parameters, is the same of any number of rows,
        by the op table: a line over the diagonals begins at another for each number."""
        scalarizer, _, element = follow(node)
        numbers = [e for s in scalarizer.body for e in ir.expressions_of(s)]
        is_fixed = element is not None and not any(self.places(n) for n in scalarizer.params)
        return is_fixed and not scalarizer.loops.rows and not any(map(self._varies, numbers))

    def _keeps_place(self, source: fx.Node, node: fx.Node) -> bool:
        """Return whether a reshape keeps the dim whole, with the same number of elements before
        it."""
        found = []
        for n in (source, node):
            places, shape = self.places(n), g.shape(n)
            if len(places) != 1 or shape[places[0]] != self.symbol:
                return False
            found.append(product(shape[: places[0]]))
        return bool(found[0] == found[1])

    def _is_along_others(self, node: fx.Node, grown: list[fx.Node]) -> bool:
        given = g.argument(node, _ALONG[node.target])
        rank = len(g.shape(grown[0]))
        along = given if isinstance(given, (list, tuple)) else [given]
        dims = {d % rank for d in along} if given is not None and along else set(range(rank))
        return not any(dims & set(self.places(n)) for n in grown)

    def _has_rows(self, node: fx.Node, grown: list[fx.Node]) -> bool:
        rows = g.operand(node, _ROWS[node.target])
        return grown == [rows] and len(g.shape(rows)) - 1 not in self.places(rows)

    def _has_scaled_rows(self, node: fx.Node, grown: list[fx.Node]) -> bool:
        rows, scale = node.args[0], node.args[1 if node.target is quantize_rows else 4]
        own = [n for n in (rows, scale) if n is not None]
        return grown == own and not any(len(g.shape(n)) - 1 in self.places(n) for n in grown)

    def _is_whole(self, node: fx.Node, grown: list[fx.Node]) -> bool:
        """Return whether a slice or select is along another dim, or takes all of this one."""
        if not grown:
            return False  # the number of rows taken from a table depends on the call
        cut = int(g.argument(node, "dim")) % len(g.shape(grown[0]))
        return cut not in self.places(grown[0]) or g.shape(node) == g.shape(grown[0])

    def _normalizes(self, node: fx.Node, grown: list[fx.Node]) -> bool:
        rank, shape = len(g.shape(grown[0])), node.args[1]
        assert isinstance(shape, (list, tuple))
        first = rank - len(shape)
        return grown == [node.args[0]] and all(d < first for d in self.places(grown[0]))

    def _looks_up(self, node: fx.Node, grown: list[fx.Node]) -> bool:
        """Return whether the source is a fixed table, or the indices are the positions of
        tokens."""
        if not self.places(g.operand(node, 0)):
            return True
        others = [n for n in node.all_input_nodes if n is not node.args[0]]
        return all(n.name in PLACES and n.op == "placeholder" for n in others)


def _find_lines(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes of which kernels make no more than elements that are read along diagonals,
    and that the op table defines element by element."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        read = [u in found or u.target is along_diagonals for u in node.users]
        row = OPS.get(node.target)
        if read and all(read) and (is_view(node) or (row is not None and not row.reduces)):
            found.add(node)
    return found
