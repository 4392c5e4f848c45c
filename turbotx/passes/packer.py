"""Packer: walks a graph over (batch, seq) and emits the equivalent over one token axis beside it.

In: a rewritten graph, its sizes, which inputs have one row per token. Out: for every node a
`ByToken`; or the node itself if it does not vary by token (computed from sizes, parameters and
per-sequence values); or the reason why it mixes tokens. The rules are in `token_rules`,
`token_sums` and `token_attention`::

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
"""Returns a ByToken, a node that does not vary by token, or a list for a split; raises Refused."""


class Inputs:
    """The packed program's own inputs, each created on first use.

    tokens: a size.
    bounds, starts: of sequences.
    positions, sequence_of: of tokens.
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
    """The walk over one graph.

    known: constant values that follow from the mask.
    from_start, to_end: whether columns before the first and after the last unmasked token must be
    kept.
    """

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
        """Compute the value of every node in graph order. A node that mixes tokens is recorded as
        Refused, which is raised by its users."""
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
        """Return a node's value over tokens. Raises Refused for an op without a rule."""
        rule = self._rule_of(node)
        if rule is None:
            raise Refused(node, "is no op that is known to take each token by itself")
        return rule(self, node)

    def _rule_of(self, node: fx.Node) -> Rule | None:
        row = OPS.get(node.target)
        plain = row is not None and row.kind == "pointwise"
        return self.rules.get(node.target, self.rules["pointwise"] if plain else None)

    # --- used by rules ---

    def emit(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Emit a call at the current position of the walk."""
        with self.graph.inserting_before(self._anchor):
            return g.emit(like, target, *args, **kwargs)

    def stand_at(self, node: fx.Node) -> None:
        """Emit new calls before `node`."""
        self._anchor = node

    def here(self) -> Any:
        """Return a context manager that inserts at the current position of the walk."""
        return self.graph.inserting_before(self._anchor)

    def emit_piece(self, like: fx.Node, pieces: fx.Node, k: int) -> fx.Node:
        """Return one tensor of a split."""
        with self.graph.inserting_before(self._anchor):
            return g.emit_piece(like, pieces, k)

    def find(self, node: Any) -> ByToken | None:
        """Return an operand over tokens; None if it is the same for every token (of a batch row).
        Raises Refused if it is neither."""
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
        """Return an operand that must be the same for all tokens. Raises Refused if it varies."""
        if g.is_tensor(node) and (
            node in self.values or any(map(self.sizes.varies, g.shape(node)))
        ):
            raise Refused(of, f"reads {what} that is not the same for every token")
        return node

    def operand(self, node: fx.Node, position: int = 0) -> ByToken:
        """Return an operand that must be over tokens. Raises Refused if it is not."""
        found = self.find(node.args[position])
        if found is None:
            raise Refused(node, "reads no tensor over tokens")
        return found

    def apart(self, node: fx.Node, x: ByToken, dim: int) -> int:
        """Return a dim along which an op works, as a nonnegative index. Raises Refused if it is the
        dim of the tokens."""
        dim = dim % len(x.dims)
        if {"s", "b"} & set(x.dims[dim]):
            raise Refused(node, "works along the dim that holds the tokens, so that they meet")
        return dim

    def fixed_dims(self, node: fx.Node, dims: Dims, at: int) -> Dims:
        """Return dims with dim `at` replaced by the node's own extent. Raises Refused if that is
        not constant."""
        fixed = self.sizes.fixed(g.shape(node)[at])
        if fixed is None:
            raise Refused(node, f"has the size {g.shape(node)[at]} beside its tokens")
        return (*dims[:at], fixed, *dims[at + 1 :])

    def token(self, node: fx.Node, dims: Dims) -> ByToken:
        """Return a ByToken, checked against the extents that its dims imply. Raises Refused if they
        differ."""
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

    # --- tensors over columns, by token ---

    def pull(self, node: fx.Node) -> ByToken:
        """Return a tensor over the columns as one over tokens, holding the element at each token's
        column: computed by a rule if the op has one, otherwise gathered."""
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
        """Return a tensor that varies by batch row as one over tokens, holding the element of each
        token's row. Raises Refused if it has an extent in the columns' position.

        b, s: the batch dim and the token dim, counted from the end.
        """
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
