"""Pack check: checks, independently of `pack`, that a packed graph does not mix tokens.

In: a packed graph. Out: nothing, or a VerifyError naming a node that combines tokens other than
through bounds. It uses the op table rather than the pass's rules: for the element of a result at
token t, everything that it loads from a tensor over tokens must be at t, for example::

    flip of tokens: element t loads token tokens - 1 - t  ->  VerifyError
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from turbotx import ir
from turbotx.errors import VerifyError
from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import ONE, Expr, dim, is_nonnegative, product
from turbotx.ir.packed_ops import (
    packed_attention,
    sequence_cumsum,
    sequence_max,
    sequence_sum,
    sequence_token,
)
from turbotx.ir.quantized_ops import quantized_linear, weight_only_linear
from turbotx.ir.strides import contiguous_strides
from turbotx.ir.views import SPLITS, VIEWS, is_view, view_source
from turbotx.ops import OPS
from turbotx.ops.loop_nest import FusionConflict, LoopNest, NeedsAxisSplit
from turbotx.ops.scalarizer import Scalarizer

aten = torch.ops.aten
_PRODUCTS: dict[Any, int] = {
    aten.linear.default: 0, aten.mm.default: 0, aten.bmm.default: 0, aten.matmul.default: 0,
    aten.addmm.default: 1, quantized_linear: 0, weight_only_linear: 0,
}  # fmt: skip
"""Products, with the index of the operand whose rows may be tokens."""
_ALONG = frozenset({sequence_sum, sequence_max, sequence_token, sequence_cumsum})


def check_packed(graph: fx.Graph, tokens: str) -> None:
    """Raise VerifyError for the first node that mixes tokens or fixes their number.

    tokens: the name of their dim.
    """
    _Check(dim(tokens)).run(graph)


class _Check:
    def __init__(self, tokens: sympy.Symbol) -> None:
        self.tokens = tokens

    def run(self, graph: fx.Graph) -> None:
        given = {n.name: n for n in graph.find_nodes(op="placeholder")}
        if not any(self.axis(n) is not None for n in given.values()):
            raise VerifyError("no input of a packed graph has a row a token: one is of fixed size")
        for node in graph.nodes:
            if node.op != "call_function" or g.is_size(node) or node.target in SPLITS:
                continue
            over = [n for n in node.all_input_nodes if g.is_tensor(n) and self.axis(n) is not None]
            if over:
                self.check(node, over, given)

    def axis(self, node: fx.Node) -> int | None:
        """Return the dim of the tokens, None if a tensor has none."""
        found = [d for d, e in enumerate(g.shape(node)) if self.tokens in e.free_symbols]
        if len(found) > 1 or any(g.shape(node)[d] != self.tokens for d in found):
            raise VerifyError(f"{node.name} has tokens in other than one dim: {g.shape(node)}")
        return found[0] if found else None

    def check(self, node: fx.Node, over: list[fx.Node], given: dict[str, fx.Node]) -> None:
        if node.target is packed_attention:
            self._same_axis(node, node.args[:3], 2, 1)
            self._by_bounds(node, 6, given)
        elif node.target in _ALONG:
            self._same_axis(node, node.args[:1], node.args[2], None)
            self._by_bounds(node, 1, given)
        elif node.target in _PRODUCTS:
            rows = g.operand(node, _PRODUCTS[node.target])
            at = self.axis(rows)
            scale = g.optional(node, 4) if node.target is quantized_linear else None
            own = [rows] if scale is None else [rows, scale]
            twice = sum(a is rows for a in node.args) > 1
            if over != own or twice or at is None or at == len(g.shape(rows)) - 1:
                raise VerifyError(f"{node.name} multiplies tokens with each other")
            self._same_axis(node, own, at, at)
        elif node.target is aten.cat.default:  # parts are read under masks on positions
            rank = len(g.shape(node))
            joined = int(g.argument(node, "dim")) % rank
            if joined == self.axis(node):
                raise VerifyError(f"{node.name} joins tokens of one tensor to those of another")
            self._same_axis(node, node.args[0], self.axis(node), None)
        elif VIEWS.get(node.target) == "reshape":
            self._reshape(node)
        elif node.target in OPS or is_view(node):
            self._pull(node)
        else:
            raise VerifyError(f"{node.name} ({node.target}) is no op that keeps tokens apart")

    def _same_axis(self, node: fx.Node, operands: Any, at: Any, out: int | None) -> None:
        if any(self.axis(n) != at for n in operands) or (
            out is not None and self.axis(node) != out
        ):
            raise VerifyError(f"{node.name} has its tokens along other dims than it works on")

    def _by_bounds(self, node: fx.Node, position: int, given: dict[str, fx.Node]) -> None:
        for k, name in enumerate(("bounds", "starts") if position == 6 else ("bounds",)):
            if node.args[position + k] is not given.get(name):
                raise VerifyError(f"{node.name} is not given the {name} of the batch")

    def _reshape(self, node: fx.Node) -> None:
        """In row-major order, a token keeps its elements if the number of elements after its dim
        does not change."""
        source = view_source(node)
        behind = []
        for n in (source, node):
            at = self.axis(n)
            assert at is not None, f"{node.name} loses its tokens"
            behind.append(product(g.shape(n)[at + 1 :]))
        if behind[0] != behind[1]:
            raise VerifyError(f"{node.name} takes tokens apart")

    def _pull(self, node: fx.Node) -> None:
        """Check what one element of a result loads, according to the op table."""
        loops = LoopNest({})
        scalarizer = Scalarizer(lambda n: n is not node, loops)
        index = tuple(loops.make(e, f"a{d}") for d, e in enumerate(g.shape(node)))
        at = self.axis(node)
        try:
            scalarizer.element(node, index)
        except (FusionConflict, NeedsAxisSplit) as conflict:
            raise VerifyError(f"{node.name} cannot be looked at: {conflict}") from conflict
        along = set() if at is None else {s.name[1:] for s in index[at].free_symbols}
        if along & set(loops.rows):
            raise VerifyError(f"{node.name} reduces over tokens")
        nodes = {name: n for n, name in scalarizer.params.items()}
        for s in scalarizer.body:
            if isinstance(s, ir.Load) and self.axis(nodes[s.access.param]) is not None:
                self._load(node, nodes[s.access.param], s.access.offset, loops,
                           None if at is None else index[at])  # fmt: skip

    def _load(
        self, node: fx.Node, source: fx.Node, offset: Expr, loops: LoopNest, here: Expr | None
    ) -> None:
        """Raise VerifyError unless an offset lies within the token's own row."""
        shape, at = g.shape(source), self.axis(source)
        assert at is not None
        behind = product(shape[at + 1 :])
        if here is not None:
            strides = contiguous_strides(shape)
            rest = (offset - here * (strides[at] if behind != 0 else ONE)).expand()
            if rest.is_Integer and rest == 0:
                return
            rows, place = self._apart(rest)
            low, high = loops.bounds(place)
            inside = low is not None and is_nonnegative(low) and high is not None
            if (
                inside and high is not None and is_nonnegative(behind - 1 - high)
                and here not in rows.free_symbols and rows.coeff(self.tokens, 0) == 0
            ):  # fmt: skip
                return
        raise VerifyError(
            f"{node.name} reads {source.name} at the place of another token: {offset}"
        )

    def _apart(self, rest: Expr) -> tuple[Expr, Expr]:
        """Return the part of an offset that is a multiple of the number of tokens, and the rest."""
        terms = sympy.Add.make_args(rest)
        rows = [t for t in terms if self.tokens in t.free_symbols]
        return sympy.Add(*rows), sympy.Add(*(t for t in terms if t not in rows))
