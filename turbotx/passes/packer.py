"""Packer: walks a graph over (batch, seq) and writes the same over one axis of tokens beside it.

In: a rewritten graph, its sizes, which inputs have a row a token. Out: for every node a `ByToken`,
that it is as it was ("whole": made of sizes, parameters and what is known by sequence), or why it
keeps no tokens apart; the rules lie in `token_rules`, `token_sums` and `token_attention`::

    packer.run();  packer.values[layer_norm]  ->  ByToken(layer_norm_1, (("b",), ("s",), (384,)))
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ops import OPS
from turbotx.passes.known_values import KnownValues
from turbotx.passes.tokens import ByToken, Dims, Refused, TokenSizes, extent_of

aten = torch.ops.aten
Rule = Callable[["Packer", fx.Node], Any]
"""Returns a ByToken, a node that is whole, or the tensors of a split; raises Refused."""


class Inputs:
    """The packed program's own inputs, each made when it is asked for.

    tokens: a size. bounds, starts: of sequences. positions, sequence_of: of tokens.
    """

    def __init__(self, graph: fx.Graph, sizes: TokenSizes, fakes: Mapping[str, Any]) -> None:
        self._first = next(iter(graph.nodes))
        self._graph, self._sizes, self._fakes = graph, sizes, fakes
        self.made: dict[str, fx.Node] = {}

    def add(self, name: str, fake: torch.Tensor) -> fx.Node:
        """Return a new input of the graph."""
        with self._graph.inserting_before(self._first):
            node = self._graph.create_node("placeholder", name, name=name)
        node.meta["val"] = fake
        return node

    def __getitem__(self, name: str) -> fx.Node:
        if name not in self.made:
            self.made[name] = self.add(name, self._fakes[name])
        return self.made[name]


class Packer:
    """One graph's walk. known: what elements of the mask tell. from_start, to_end: whether columns
    before the first and behind the last token that the mask shows have to be kept."""

    def __init__(
        self, graph: fx.Graph, sizes: TokenSizes, inputs: Inputs, known: KnownValues,
        rules: Mapping[Any, Rule],
    ) -> None:  # fmt: skip
        self.graph, self.sizes, self.inputs, self.known = graph, sizes, inputs, known
        self.rules = rules
        self.values: dict[fx.Node, Any] = {}
        self.from_start = self.to_end = False
        self._pulled: dict[fx.Node, ByToken | Refused] = {}
        self._anchor: Any = None

    def run(self) -> None:
        """Find the value of every node, in the graph's order; what keeps no tokens apart is
        remembered, and raised by whoever needs it."""
        for node in list(self.graph.nodes):
            if node.op != "call_function" or node in self.values:
                continue
            if not any(n in self.values for n in node.all_input_nodes) or g.is_size(node):
                continue
            self._anchor = node
            try:
                made = self.apply(node)
            except Refused as refused:
                self.values[node] = refused
                continue
            if isinstance(made, fx.Node) and g.shape(made) != g.shape(node):
                self.values[node] = Refused(node, f"is by sequence of the sizes {g.shape(made)}")
            elif isinstance(made, fx.Node):
                node.replace_all_uses_with(made)
            else:
                self.values[node] = made

    def apply(self, node: fx.Node) -> Any:
        """Return what a node is over tokens. Raises Refused for an op without a rule."""
        rule = self._rule_of(node)
        if rule is None:
            raise Refused(node, "is no op that is known to take each token by itself")
        return rule(self, node)

    def _rule_of(self, node: fx.Node) -> Rule | None:
        row = OPS.get(node.target)
        plain = row is not None and row.kind == "pointwise"
        return self.rules.get(node.target, self.rules["pointwise"] if plain else None)

    # --- what rules ask ---

    def emit(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Return a new call, where the walk stands, whole or packed."""
        with self.graph.inserting_before(self._anchor):
            return g.emit(like, target, *args, **kwargs)

    def stand_at(self, node: fx.Node) -> None:
        """Let new calls go in front of a node."""
        self._anchor = node

    def here(self) -> Any:
        """Return the time in which new calls go where the walk stands."""
        return self.graph.inserting_before(self._anchor)

    def emit_piece(self, like: fx.Node, pieces: fx.Node, k: int) -> fx.Node:
        """Return one tensor of a split."""
        with self.graph.inserting_before(self._anchor):
            return g.emit_piece(like, pieces, k)

    def find(self, node: Any) -> ByToken | None:
        """Return an operand over tokens; None where it is whole and the same for every token and
        batch row, or for every token of a row. Raises Refused where it is neither."""
        if not g.is_tensor(node):
            return None
        value = self.values.get(node)
        if isinstance(value, Refused):
            raise value
        if value is not None:
            assert isinstance(value, ByToken)
            return value
        return self.pull(node) if any(map(self.sizes.is_seq, g.shape(node))) else None

    def whole(self, node: Any, what: str, of: fx.Node) -> Any:
        """Return an operand that has to be one thing for all tokens. Raises Refused where it varies
        by token."""
        if g.is_tensor(node) and (
            node in self.values or any(map(self.sizes.varies, g.shape(node)))
        ):
            raise Refused(of, f"reads {what} that is not the same for every token")
        return node

    def operand(self, node: fx.Node, position: int = 0) -> ByToken:
        """Return an operand that has to be over tokens. Raises Refused where it is not."""
        found = self.find(node.args[position])
        if found is None:
            raise Refused(node, "reads no tensor over tokens")
        return found

    def apart(self, node: fx.Node, x: ByToken, dim: int) -> int:
        """Return a dim that an op works along, from the front; it may hold no tokens. Raises
        Refused where it does."""
        dim = dim % len(x.dims)
        if {"s", "b"} & set(x.dims[dim]):
            raise Refused(node, "works along the dim that holds the tokens, so that they meet")
        return dim

    def fixed_dims(self, node: fx.Node, dims: Dims, at: int) -> Dims:
        """Return dims with that of dim `at` as the node's own extent, a number. Raises Refused
        where that is no number."""
        fixed = self.sizes.fixed(g.shape(node)[at])
        if fixed is None:
            raise Refused(node, f"has the size {g.shape(node)[at]} beside its tokens")
        return (*dims[:at], fixed, *dims[at + 1 :])

    def token(self, node: fx.Node, dims: Dims) -> ByToken:
        """Return a ByToken, checked to have the extents that its dims say. Raises Refused where it
        has others."""
        shape = g.shape(node)
        tokens = g.size(self.tokens)
        wanted = [extent_of(f) * (tokens if "s" in f else 1) for f in dims]
        if list(shape) != wanted:
            raise Refused(node, f"has the sizes {shape}, not {tuple(wanted)}")
        return ByToken(node, dims)

    @property
    def tokens(self) -> fx.Node:
        """The number of tokens, as a size node."""
        if "tokens" not in self.inputs.made:
            of = self.inputs["positions"]
            with self.graph.inserting_after(self.inputs.made["positions"]):
                node = self.graph.call_function(aten.sym_size.int, (of, 0))
            node.meta["val"] = g.tensor(of).shape[0]
            self.inputs.made["tokens"] = node
        return self.inputs.made["tokens"]

    def extents(self, dims: Dims) -> list[Any]:
        """Return the sizes of a packed tensor, as arguments of a call."""
        return [self._extent(factors) for factors in dims]

    def _extent(self, factors: tuple[Any, ...]) -> Any:
        number = extent_of(factors)
        if "s" not in factors:
            return number
        return self.tokens if number == 1 else self._times(number)

    def _times(self, number: int) -> fx.Node:
        with self.graph.inserting_before(self._anchor):
            node = self.graph.call_function(operator.mul, (self.tokens, number))
        node.meta["val"] = self.tokens.meta["val"] * number
        return node

    # --- whole tensors by token ---

    def pull(self, node: fx.Node) -> ByToken:
        """Return a whole tensor over the columns as one over tokens: an element of each token's own
        column, computed from columns where an op is known to, or else looked up."""
        if node not in self._pulled:
            try:
                self._pulled[node] = self._pull(node)
            except Refused as refused:
                self._pulled[node] = refused
        found = self._pulled[node]
        if isinstance(found, Refused):
            raise found
        return found

    def _pull(self, node: fx.Node) -> ByToken:
        shape = g.shape(node)
        columns = [d for d, extent in enumerate(shape) if self.sizes.is_seq(extent)]
        if len(columns) != 1:
            raise Refused(node, "has an element for each pair of columns")
        counts = g.is_call(node, aten.arange.start_step) and len(shape) == 1
        numbers = [g.argument(node, n, v) for n, v in (("start", 0), ("step", 1))] if counts else []
        if counts and all(isinstance(n, int) for n in numbers):
            return self._count(node, *numbers)
        if node.op == "call_function" and self._rule_of(node) is not None:
            try:
                made = self.apply(node)
                if isinstance(made, ByToken):
                    return made
            except Refused:
                pass
        batch = [d for d, extent in enumerate(shape) if self.sizes.is_batch(extent)]
        if batch and (batch, columns) != ([0], [1]):
            raise Refused(node, "has batch rows and columns in an order that no token is looked up")
        dims = self._dims_of(node)
        if not batch:
            at = self.inputs["positions"]
            return self.token(
                self.emit(node, aten.index_select.default, node, columns[0], at), dims
            )
        both = [self.inputs["sequence_of"], self.inputs["positions"]]
        rows = self.emit(node, aten.index.Tensor, node, both)
        return self.token(self.emit(node, aten.unsqueeze.default, rows, 0), dims)

    def _count(self, node: fx.Node, start: int, step: int) -> ByToken:
        made = self.inputs["positions"]
        if step != 1:
            made = self.emit(node, aten.mul.Tensor, made, step)
        if start != 0:
            made = self.emit(node, aten.add.Tensor, made, start)
        if g.dtype(node) != torch.int64:
            made = self.emit(node, aten._to_copy.default, made, dtype=g.dtype(node))
        return self.token(made, (("s",),))

    def _dims_of(self, node: fx.Node) -> Dims:
        found: list[tuple[Any, ...]] = []
        for extent in g.shape(node):
            if self.sizes.is_seq(extent):
                found.append(("s",))
            elif self.sizes.is_batch(extent):
                found.append(("b",))
            else:
                fixed = self.sizes.fixed(extent)
                if fixed is None:
                    raise Refused(node, f"has the size {extent}, made of the batch or of columns")
                found.append(fixed)
        return tuple(found)

    def spread(self, node: fx.Node, b: int, s: int) -> ByToken:
        """Return a whole tensor by batch row, its batch along dim `b`, both counted from the end,
        as one over tokens along dim `s`: an element of each token's own row. Raises Refused where
        it has an extent in the columns' place."""
        rank = len(g.shape(node))
        wide = max(rank, -s)
        made = self.emit(
            node, aten.index_select.default, node, b + rank, self.inputs["sequence_of"]
        )
        for _ in range(wide - rank):
            made = self.emit(node, aten.unsqueeze.default, made, 0)
        dims = [f or () for f in map(self.sizes.fixed, g.shape(node))]
        dims = [()] * (wide - rank) + dims
        if g.shape(made)[s + wide] != 1:
            raise Refused(node, "has an extent where other operands have their columns")
        order = list(range(wide))
        order[b + wide], order[s + wide] = order[s + wide], order[b + wide]
        dims[b + wide], dims[s + wide] = ("b",), ("s",)
        return self.token(self.emit(node, aten.permute.default, made, order), tuple(dims))
