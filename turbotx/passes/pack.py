"""Pack: rewrites a graph over (batch, seq) with a mask to one over a single token axis.

In: a rewritten capture. Out: a `PackedCapture`, whose inputs have one row per token, with bounds
that say where sequences begin; or a PackError naming the node that mixes tokens::

    embedding(table, ids (batch, seq))       ->  embedding(table, ids (1, tokens))
    attention(q, k, v, keys), select(x, 1, 0)
      ->  packed_attention(q, k, v, keys, None, None, bounds, starts), sequence_token(x, bounds)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic

from turbotx.capture.result_layouts import ORDER, RETURNS, Alias
from turbotx.capture.shape_matcher import ShapeMatcher
from turbotx.capture.trace import Captured
from turbotx.errors import PackError
from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import Expr, dim, expr
from turbotx.ir.memory_order import by_order, inverse
from turbotx.passes.canonicalize import canonicalize
from turbotx.passes.known_values import KnownValues
from turbotx.passes.packer import Inputs, Packer
from turbotx.passes.packing import MASK, PackedInput, PackedOutput, TokenPacking
from turbotx.passes.quantized_tokens import QUANTIZED
from turbotx.passes.spare_rows import find_spare
from turbotx.passes.token_attention import ATTENTION
from turbotx.passes.token_rules import RULES
from turbotx.passes.token_sums import SUMS
from turbotx.passes.tokens import ByToken, Refused, TokenSizes

aten = torch.ops.aten
TOKENS = "tokens"
EXAMPLE = 1009
"""Number of tokens of the fake tensors of a packed graph; no result depends on it."""


@dataclass(frozen=True, kw_only=True)
class PackedCapture(Captured):
    """A capture over tokens: its dims are those of the padded call, followed by "tokens"."""

    packing: TokenPacking
    padded: Captured

    @cached_property
    def matcher(self) -> ShapeMatcher:
        """The matcher for sizes of the padded call."""
        return self.padded.matcher


def pack(captured: Captured) -> PackedCapture:
    """Return a rewritten capture as one over tokens; modifies its graph.

    Raises PackError if a node mixes tokens, or if the call has no mask.
    """
    mask, sizes = _find_sizes(captured)
    graph, nodes = captured.graph, captured.graph.find_nodes(op="placeholder")
    fakes = _make_fakes(captured, nodes, sizes)
    inputs = Inputs(graph, sizes, fakes)
    rules = {**RULES, **SUMS, **ATTENTION, **QUANTIZED}
    packer = Packer(graph, sizes, inputs, KnownValues(nodes[mask]), rules)
    sources = {}
    try:
        packer.stand_at(next(n for n in graph.nodes if n.op != "placeholder"))
        for place, (node, shape) in enumerate(zip(nodes, captured.input_sizes, strict=True)):
            if _is_by_token(sizes, shape):
                rest = [sizes.fixed(e) for e in shape[2:]]
                if None in rest:
                    raise Refused(node, "is an input of more sizes than (batch, seq)")
                packed = inputs.add(f"{node.name}_tokens", _fake_rows(node, fakes))
                rows = ByToken(packed, (("b",), ("s",), *(f or () for f in rest)))
                packer.values[node] = _in_memory(packer, node, rows)
                sources[packed] = PackedInput(packed.name, place, True)
            else:
                sources[node] = PackedInput(node.name, place, False)
        packer.run()
        outputs = _pack_outputs(packer)
    except Refused as refused:
        raise refused.error(captured.name) from None
    _replace_sizes(graph, nodes, sizes, inputs)
    canonicalize(graph)
    for node in graph.find_nodes(op="placeholder"):
        if not node.users:
            graph.erase_node(node)
    left = graph.find_nodes(op="placeholder")
    given = tuple(sources.get(n) or PackedInput(n.name, None, False) for n in left)
    batch = g.size(fakes["starts"].shape[0])
    packing = TokenPacking(
        mask, str(batch), str(sizes.seq), given, outputs, packer.from_start, packer.to_end,
        *_find_spare(graph, sizes, batch),
    )  # fmt: skip
    own = {f: getattr(captured, f) for f in captured.__dataclass_fields__}
    own |= {
        "input_names": tuple(n.name for n in left),
        "input_sizes": tuple(g.shape(n) for n in left),
        "dims": (*captured.dims, TOKENS),
        "example_dims": (*captured.example_dims, EXAMPLE),
    }
    return PackedCapture(**own, packing=packing, padded=replace(captured))


def _find_sizes(captured: Captured) -> tuple[int, TokenSizes]:
    """Return the index of the mask among the inputs, and the symbols of its sizes."""
    why = ""
    if MASK not in captured.input_names:
        why = f"the call has no {MASK}, from which its tokens would be known"
    elif kept := [effect.text for effect in captured.effects if effect.is_of_call]:
        why = f"the model keeps tensors or sizes of a call in {kept[0]!r}, rows of padding included"
    elif TOKENS in captured.dims:
        why = f"a dim of its inputs is called {TOKENS!r} already"
    mask = captured.input_names.index(MASK) if not why else 0
    shape = captured.input_sizes[mask]
    if not why and not (len(set(shape)) == 2 and all(e.is_Symbol for e in shape)):
        why = f"{MASK} is not (batch, seq), but {tuple(map(str, shape))}"
    if why:
        raise PackError(f'cannot pack {captured.name}: {why}. Leave out padding="packed"')
    seq = shape[1]
    alike = [s for s in captured.input_sizes if len(s) > 1 and s[1] == seq and s[0].is_Symbol]
    if len(alike) < 2:
        raise PackError(
            f"cannot pack {captured.name}: no other input has the columns of {MASK}, so that the "
            'model does not read it for them. Leave out padding="packed"'
        )
    rows = {s[0] for s in alike}
    return mask, TokenSizes(frozenset(rows), seq)


def _is_by_token(sizes: TokenSizes, shape: Any) -> bool:
    return len(shape) > 1 and sizes.is_batch(shape[0]) and sizes.is_seq(shape[1])


def _make_fakes(
    captured: Captured, nodes: list[fx.Node], sizes: TokenSizes
) -> Mapping[str, torch.Tensor]:
    """Return fake tensors for the packed program's own inputs, and register names of its sizes."""
    given = zip(nodes, captured.input_sizes, strict=True)
    node = next(n for n, shape in given if _is_by_token(sizes, shape))
    value = g.tensor(node)
    mode = g.fake_mode_of(value)
    env, source = mode.shape_env, ConstantSource(TOKENS)
    symbol = env.create_symbol(EXAMPLE, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    tokens = env.create_symintnode(symbol, hint=EXAMPLE, source=source)
    batch, seq = by_order(value.shape, inverse(node.meta.get(ORDER)))[:2]
    # Inputs may have been captured with different batch symbols; a packed batch has one.
    extents = [(s, e) for n in nodes for s, e in zip(g.tensor(n).shape, g.shape(n), strict=True)]
    row = g.size(batch)
    rows = {expr(s): row for s, e in extents if sizes.is_batch(e)}
    g.remember_names(captured.graph_module, {symbol: dim(TOKENS), **rows})
    lengths = {
        "positions": tokens, "sequence_of": tokens, "bounds": batch + 1, "starts": batch,
        "columns": seq,
    }  # fmt: skip
    with mode:
        return {n: value.new_empty((k,), dtype=torch.int64) for n, k in lengths.items()}


def _fake_rows(node: fx.Node, fakes: Mapping[str, torch.Tensor]) -> torch.Tensor:
    value: Any = g.tensor(node)
    rest = by_order(value.shape, inverse(node.meta.get(ORDER)))[2:]
    with value.fake_mode:
        return value.new_empty((1, fakes["positions"].shape[0], *rest))


def _in_memory(p: Packer, node: fx.Node, rows: ByToken) -> ByToken:
    """Return rows with their dims in the order of an input whose dims lie so in memory."""
    order = node.meta.get(ORDER)
    if order is None:
        return rows
    made = p.emit(node, aten.permute.default, rows.node, list(order))
    return p.token(made, by_order(rows.dims, order))


def _replace_sizes(
    graph: fx.Graph, nodes: list[fx.Node], sizes: TokenSizes, inputs: Inputs
) -> None:
    """Read sizes of the padded call's tensors from the packed program's inputs instead."""
    for node in list(graph.nodes):
        source = node.args[0] if g.is_call(node, aten.sym_size.int) else None
        if source not in nodes or not node.users:
            continue
        extent = g.size(node)
        if sizes.is_batch(extent) or sizes.is_seq(extent):
            node.args = (inputs["starts" if sizes.is_batch(extent) else "columns"], 0)


def _pack_outputs(p: Packer) -> tuple[PackedOutput | None, ...]:
    """Make every leaf over tokens an output of (tokens, ...)."""
    (output,) = p.graph.find_nodes(op="output")
    p.stand_at(output)
    leaves, kinds = list(output.args[0]), list[PackedOutput | None]()
    returns = output.meta.pop(RETURNS, [None] * len(leaves))
    for k, leaf in enumerate(leaves):
        found = p.values.get(leaf)
        if isinstance(found, Refused):
            raise found
        if isinstance(returns[k], Alias):
            raise Refused(leaf, "is returned, and is what the call was given, or a parameter")
        kinds.append(None if found is None else _kind_of(leaf, found))
        if found is not None:
            leaves[k] = _rows_first(p, leaf, found)
    output.args = (type(output.args[0])(leaves),)
    return tuple(kinds)


def _find_spare(graph: fx.Graph, sizes: TokenSizes, batch: Expr) -> tuple[Any, ...]:
    """Return the dims that may be larger than a call's, and where they occur in leaves."""
    spare = set(find_spare(graph, str(batch), str(sizes.seq)))
    spare |= {str(s) for s in sizes.batch} if str(batch) in spare else set()
    (output,) = graph.find_nodes(op="output")
    extents = [
        [(d, str(e)) for d, e in enumerate(g.shape(leaf)) if str(e) in spare]
        if g.is_tensor(leaf) else []
        for leaf in output.args[0]
    ]  # fmt: skip
    return tuple(sorted(spare)), tuple(map(tuple, extents))


def _kind_of(leaf: fx.Node, x: ByToken) -> PackedOutput:
    if x.dims[x.s] == ("b", "s"):
        return PackedOutput(None, x.s)
    if x.dims[x.s] != ("s",) or x.b is None or x.dims[x.b] != ("b",):
        raise Refused(leaf, "is returned with its batch or columns in parts of a dim")
    return PackedOutput(x.b, x.s)


def _rows_first(p: Packer, leaf: fx.Node, x: ByToken) -> fx.Node:
    made = x.node
    if x.s != 0:
        order = [x.s, *(d for d in range(len(x.dims)) if d != x.s)]
        made = p.emit(leaf, aten.permute.default, made, order)
    if x.b is not None and x.b != x.s:
        made = p.emit(leaf, aten.squeeze.dims, made, [x.b + (x.b < x.s)])
    return made
