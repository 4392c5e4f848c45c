"""Token rules: ops that treat each token independently, rewritten over one token axis.

In: a packer and a node with an operand over tokens. Out: the same op over tokens, with the sizes
and dims of the packed tensors. Refused if it would mix tokens. One rule per op, for example::

    linear(x, weight, bias)  ->  linear(x of tokens, weight, bias), if the last dim holds no token
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.passes.packer import Packer, Rule
from turbotx.passes.token_sums import take_token
from turbotx.passes.tokens import ByToken, Dims, Refused

aten = torch.ops.aten

# --- elementwise ---


def pointwise(p: Packer, node: fx.Node) -> ByToken:
    """Align operands from the right, as broadcasting does; those over columns are gathered. Raises
    Refused for operands of other sizes."""
    given = [n for n in node.all_input_nodes if g.is_tensor(n)]
    tokens = {n: t for n in given if (t := p.find(n)) is not None}
    rank = len(g.shape(node))
    dims: list[tuple[Any, ...]] = [()] * rank
    for t in tokens.values():
        _join(node, dims, t.dims)
    s = next(d for d, factors in enumerate(dims) if "s" in factors) - rank
    for n in given:
        if n in tokens:
            continue
        batch = [d for d, e in enumerate(g.shape(n)) if p.sizes.is_batch(e)]
        if batch:
            tokens[n] = p.spread(n, batch[0] - len(g.shape(n)), s)
            _join(node, dims, tokens[n].dims)
        elif any(map(p.sizes.varies, g.shape(n))):
            raise Refused(node, f"reads {n.name} of the sizes {g.shape(n)} beside tokens")
    for d, extent in enumerate(g.shape(node)):
        if not {"s", "b"} & set(dims[d]):
            fixed = p.sizes.fixed(extent)
            if fixed is None and not p.sizes.is_batch(extent):
                raise Refused(node, "has an element for each pair of columns")
            dims[d] = fixed or ()
    return p.token(_again(p, node, tokens), tuple(dims))


def _join(node: fx.Node, dims: list[tuple[Any, ...]], more: Dims) -> None:
    """Record the dims in which an operand has its tokens and batch rows."""
    first = len(dims) - len(more)
    for d, factors in enumerate(more, start=first):
        if not {"s", "b"} & set(factors):
            continue
        others = [k for k, f in enumerate(dims) if k != d and set(f) & set(factors) & {"s", "b"}]
        if dims[d] not in ((), factors) or others:
            raise Refused(node, "has an element for each pair of columns or batch rows")
        dims[d] = factors


def _again(p: Packer, node: fx.Node, tokens: dict[fx.Node, ByToken]) -> fx.Node:
    def new(n: fx.Node) -> Any:
        return tokens[n].node if n in tokens else n

    target: Any = node.target
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), new)
    return p.emit(node, target, *args, **kwargs)


def _arguments(node: fx.Node) -> Any:
    return node.args


# --- views ---


def reshape(p: Packer, node: fx.Node) -> ByToken:
    """Keep batch and columns whole; split or merge the other dims. Raises Refused if batch or
    columns are split."""
    x = p.operand(node)
    dims = p.sizes.regroup(x.dims, g.shape(node))
    if dims is None:
        raise Refused(node, "takes the batch or the columns apart")
    return p.token(p.emit(node, aten.reshape.default, x.node, p.extents(dims)), dims)


def permute(p: Packer, node: fx.Node) -> ByToken:
    """Permute dims, including those of tokens."""
    x, given = p.operand(node), _arguments(node)[1:]
    rank = len(x.dims)
    if node.target is aten.permute.default:
        order = [d % rank for d in given[0]]
    else:
        order = list(range(rank))
        a, b = (int(d) % rank for d in (given or (0, rank - 1)))
        order[a], order[b] = b, a
    made = p.emit(node, aten.permute.default, x.node, order)
    return p.token(made, tuple(x.dims[d] for d in order))


def unsqueeze(p: Packer, node: fx.Node) -> ByToken:
    """Insert a dim of extent 1."""
    x, d = p.operand(node), _arguments(node)[1] % len(g.shape(node))
    dims = (*x.dims[:d], (), *x.dims[d:])
    return p.token(p.emit(node, aten.unsqueeze.default, x.node, d), dims)


def squeeze(p: Packer, node: fx.Node) -> ByToken:
    """Drop only dims that are 1 in the model's own call; a packed batch is 1 too."""
    x, source = p.operand(node), g.shape(g.operand(node, 0))
    given: Any = node.args[1] if len(node.args) > 1 else list(range(len(source)))
    listed = given if isinstance(given, (list, tuple)) else [given]
    gone = sorted({d % len(source) for d in listed if source[d % len(source)] == 1})
    dims = tuple(f for d, f in enumerate(x.dims) if d not in gone)
    return p.token(p.emit(node, aten.squeeze.dims, x.node, gone) if gone else x.node, dims)


def expand(p: Packer, node: fx.Node) -> ByToken:
    """Expand dims other than those of tokens; what does not vary over the batch keeps one row.
    Raises Refused for an element per pair of columns."""
    x, shape = p.operand(node), g.shape(node)
    new = len(shape) - len(x.dims)
    dims = [(), ] * new + list(x.dims)  # fmt: skip
    for d, extent in enumerate(shape):
        if dims[d] or p.sizes.is_batch(extent):
            continue
        fixed = p.sizes.fixed(extent)
        if fixed is None:
            raise Refused(node, "has an element for each pair of columns")
        dims[d] = fixed
    return p.token(p.emit(node, aten.expand.default, x.node, p.extents(tuple(dims))), tuple(dims))


def cut(p: Packer, node: fx.Node) -> Any:
    """Slice along other dims than tokens; of a tensor over columns, gather its first columns by
    token. Raises Refused for other columns."""
    d, step = int(g.argument(node, "dim")), g.argument(node, "step")
    start, end = g.argument(node, "start"), g.argument(node, "end")
    source, shape = g.shape(g.operand(node, 0)), g.shape(node)
    d %= len(shape)
    x = p.find(node.args[0])
    if x is None:
        if not (p.sizes.is_seq(shape[d]) and step == 1 and isinstance(start or 0, int)):
            raise Refused(node, "is no slice of the first columns")
        if any(map(p.sizes.varies, source)) or g.is_negative(start):
            raise Refused(node, "cuts columns out of what varies with them")
        at = p.inputs["positions"]
        at = p.emit(node, aten.add.Tensor, at, start) if start else at
        made = p.emit(node, aten.index_select.default, node.args[0], d, at)
        dims = [p.sizes.fixed(e) or () for e in shape]
        return p.token(made, (*dims[:d], ("s",), *dims[d + 1 :]))
    if "s" in x.dims[d] or "b" in x.dims[d]:
        if source[d] == shape[d]:
            return x
        first = not start and end == 1 and x.dims[d] == ("s",)
        if not first:
            raise Refused(node, "takes some columns of a sequence")
        return p.emit(node, aten.unsqueeze.default, take_token(p, node, x, False), d)
    made = p.emit(node, node.target, x.node, d, start, end, step)
    return p.token(made, p.fixed_dims(node, x.dims, d))


def select(p: Packer, node: fx.Node) -> Any:
    """Select along other dims than tokens; along tokens, the first or last token of each
    sequence."""
    x, at = p.operand(node), _arguments(node)[2]
    d = _arguments(node)[1] % len(x.dims)
    if x.dims[d] == ("s",) and at in (0, -1):
        return take_token(p, node, x, bool(at == -1))
    p.apart(node, x, d)
    made = p.emit(node, aten.select.int, x.node, d, at)
    return p.token(made, (*x.dims[:d], *x.dims[d + 1 :]))


def split(p: Packer, node: fx.Node) -> list[ByToken]:
    """Split a dim other than tokens. Raises Refused for parts of unknown size."""
    x = p.operand(node)
    d = p.apart(node, x, int(g.argument(node, "dim")))
    made = p.emit(node, node.target, x.node, *node.args[1:], **node.kwargs)
    pieces = []
    for k, value in enumerate(node.meta["val"]):
        dims: Any
        if node.target is aten.unbind.int:
            dims = (*x.dims[:d], *x.dims[d + 1 :])
        else:
            fixed = p.sizes.fixed(g.size(value.shape[d]))
            if fixed is None:
                raise Refused(node, "is split into parts of no known size")
            dims = (*x.dims[:d], fixed, *x.dims[d + 1 :])
        pieces.append(ByToken((made, k), dims))
    return pieces


def piece(p: Packer, node: fx.Node) -> ByToken:
    """Return one part of a split. Raises Refused if it is not a result of a split."""
    pieces: Any = p.values.get(g.operand(node, 0))
    if isinstance(pieces, Refused):
        raise pieces
    if not isinstance(pieces, list):
        raise Refused(node, "is one of several results")
    made, k = pieces[_arguments(node)[1]].node
    return p.token(p.emit_piece(node, made, k), pieces[k].dims)


def same(p: Packer, node: fx.Node) -> ByToken:
    """Return the operand."""
    return p.operand(node)


# --- concatenation, lookup, products, normalization ---


def fill(p: Packer, node: fx.Node) -> ByToken:
    """Fill with a number: every token gets what every column got."""
    dims: list[tuple[Any, ...]] = []
    for extent in g.shape(node):
        fixed = p.sizes.fixed(extent)
        dims.append(("s",) if p.sizes.is_seq(extent) else fixed or ())
    value = node.args[1] if node.target is aten.full.default else node.target is aten.ones.default
    made = p.emit(node, aten.new_full.default, p.inputs["positions"], p.extents(tuple(dims)),
                  value, dtype=g.dtype(node))  # fmt: skip
    return p.token(made, tuple(dims))


def cat(p: Packer, node: fx.Node) -> ByToken:
    """Concatenate along a dim other than tokens. Raises Refused if some parts are not by token, or
    along other dims."""
    parts: Any = node.args[0]
    found = [p.find(n) for n in parts]
    if None in found:
        raise Refused(node, "joins tokens with what is not by token")
    d = int(g.argument(node, "dim"))
    tokens = [t for t in found if t is not None]
    d = p.apart(node, tokens[0], d)
    rows = [[f if k != d else () for k, f in enumerate(t.dims)] for t in tokens]
    most = max(rows, key=lambda r: sum(len(f) for f in r))
    if any(r != most for r in rows):
        raise Refused(node, "joins tensors whose tokens lie along other dims")
    made = p.emit(node, node.target, [t.node for t in tokens], d)
    return p.token(made, p.fixed_dims(node, tokens[0].dims, d))


def embedding(p: Packer, node: fx.Node) -> ByToken:
    """Look up rows of a table by token."""
    ids, table = p.operand(node, 1), p.whole(node.args[0], "a table", node)
    made = p.emit(node, node.target, table, ids.node, *node.args[2:], **node.kwargs)
    return p.token(made, (*ids.dims, p.sizes.fixed(g.shape(node)[-1]) or ()))


def gather(p: Packer, node: fx.Node) -> ByToken:
    """Gather from a table by token, or from tokens along another dim. Raises Refused for tokens of
    other rows."""
    at, x, source = p.operand(node, 2), p.find(node.args[0]), _arguments(node)[0]
    d = _arguments(node)[1] % len(at.dims)
    if x is not None:
        p.apart(node, x, d)
        p.apart(node, at, d)
    while x is None and g.is_call(source, aten.expand.default):
        source = source.args[0]
    row = p.whole(source, "a table", node) if x is None else x.node
    extents, wanted = g.shape(row), g.shape(at.node)
    others = [k for k in range(len(at.dims)) if k != d]
    if len(extents) != len(wanted) or any(extents[k] not in (1, wanted[k]) for k in others):
        raise Refused(node, "gathers tokens of other rows")
    if any(extents[k] != wanted[k] for k in others):
        wide = [-1 if k == d else n for k, n in enumerate(p.extents(at.dims))]
        row = p.emit(node, aten.expand.default, row, wide)
    return p.token(p.emit(node, node.target, row, d, at.node), at.dims)


def index_select(p: Packer, node: fx.Node) -> ByToken:
    """Look up a table along one dim by token. Raises Refused for tokens in place of a table."""
    table, ids = p.whole(node.args[0], "a table", node), p.operand(node, 2)
    dims = [p.sizes.fixed(e) or () for e in g.shape(table)]
    d = _arguments(node)[1] % len(dims)
    made = p.emit(node, node.target, table, d, ids.node)
    return p.token(made, (*dims[:d], *ids.dims, *dims[d + 1 :]))


def index(p: Packer, node: fx.Node) -> ByToken:
    """Index a table by token; or tokens by their own (b, s), as masks do. Raises Refused if indices
    depend on values, or for several indices."""
    listed: Any = node.args[1]
    x = p.find(node.args[0])
    if x is None:
        table = p.whole(node.args[0], "a table", node)
        ids = p.find(listed[0]) if len(listed) == 1 else None
        if ids is None:
            raise Refused(node, "looks up by several indices")
        made = p.emit(node, node.target, table, [ids.node])
        rest = [p.sizes.fixed(e) or () for e in g.shape(node)[len(ids.dims) :]]
        return p.token(made, (*ids.dims, *rest))
    if x.dims != (("b",), ("s",)) or len(listed) != 2:
        raise Refused(node, "moves tokens to places that values tell")
    rank = len(g.shape(node))
    where = [None if n is None else p.known.counts_along(n) for n in listed]
    if None in where:
        raise Refused(node, "moves tokens to places that values tell")
    b, s = (d + rank for d in where if d is not None)
    dims: list[tuple[Any, ...]] = [()] * rank
    dims[b], dims[s] = ("b",), ("s",)
    shape = g.shape(node)
    if not p.sizes.is_batch(shape[b]) or not p.sizes.is_seq(shape[s]):
        raise Refused(node, "takes some columns of a sequence")
    made = p.emit(node, aten.reshape.default, x.node, p.extents(tuple(dims)))
    return p.token(made, tuple(dims))


def linear(p: Packer, node: fx.Node) -> ByToken:
    """Multiply each token's row by a weight."""
    x = p.operand(node)
    p.apart(node, x, -1)
    rest = [p.whole(a, "a weight", node) for a in node.args[1:]]
    made = p.emit(node, node.target, x.node, *rest, **node.kwargs)
    return p.token(made, p.fixed_dims(node, x.dims, len(x.dims) - 1))


def matmul(p: Packer, node: fx.Node) -> ByToken:
    """Multiply rows by token by a matrix common to all. Raises Refused for tokens times tokens."""
    x = p.find(node.args[0])
    if x is None or p.find(node.args[1]) is not None:
        raise Refused(node, "multiplies tokens with each other")
    weight: Any = p.whole(node.args[1], "a weight", node)
    p.apart(node, x, -1)
    if len(g.shape(weight)) not in (2, len(x.dims)):
        raise Refused(node, "multiplies by weights of other dims")
    for d in range(len(x.dims) - 2):
        if len(g.shape(weight)) > 2 and g.shape(weight)[d] != 1:
            p.apart(node, x, d)
    made = p.emit(node, node.target, x.node, weight)
    return p.token(made, p.fixed_dims(node, x.dims, len(x.dims) - 1))


def addmm(p: Packer, node: fx.Node) -> ByToken:
    """Multiply each token's row by a weight and add a bias. Raises Refused for tokens times
    tokens."""
    bias, x, weight = node.args
    made = p.find(x)
    if made is None:
        raise Refused(node, "multiplies tokens with each other")
    p.apart(node, made, -1)
    bias, weight = (p.whole(a, "a weight", node) for a in (bias, weight))
    out = p.emit(node, node.target, bias, made.node, weight, **node.kwargs)
    return p.token(out, p.fixed_dims(node, made.dims, len(made.dims) - 1))


def normalize(p: Packer, node: fx.Node) -> ByToken:
    """Normalise each token's row."""
    x, shape = p.operand(node), _arguments(node)[1]
    for k in range(len(shape)):
        p.apart(node, x, -1 - k)
    rest = [p.whole(a, "a weight", node) for a in node.args[2:]]
    made = p.emit(node, node.target, x.node, shape, *rest, **node.kwargs)
    return p.token(made, x.dims)


def softmax(p: Packer, node: fx.Node) -> ByToken:
    """Apply softmax along a dim other than tokens."""
    x = p.operand(node)
    d = p.apart(node, x, _arguments(node)[1])
    made = p.emit(node, node.target, x.node, d, *node.args[2:], **node.kwargs)
    return p.token(made, x.dims)


RULES: dict[Any, Rule] = {
    "pointwise": pointwise,
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default,
                     aten.flatten.using_ints, aten.unflatten.int), reshape),
    **dict.fromkeys((aten.permute.default, aten.transpose.int, aten.t.default), permute),
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), squeeze),
    **dict.fromkeys((aten.full_like.default, aten.zeros_like.default, aten.ones_like.default),
                    pointwise),
    **dict.fromkeys((aten.split_with_sizes.default, aten.split.Tensor, aten.unbind.int,
                     aten.chunk.default), split),
    **dict.fromkeys((aten.alias.default, aten.detach.default), same),
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default), matmul),
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default), normalize),
    **dict.fromkeys((aten.softmax.int, aten._softmax.default, aten.log_softmax.int,
                     aten._log_softmax.default), softmax),
    aten.unsqueeze.default: unsqueeze, aten.expand.default: expand, aten.slice.Tensor: cut,
    aten.select.int: select, g.GETITEM: piece, aten.cat.default: cat,
    aten.embedding.default: embedding, aten.index_select.default: index_select,
    aten.gather.default: gather, aten.index.Tensor: index,
    **dict.fromkeys((aten.full.default, aten.zeros.default, aten.ones.default), fill),
    aten.linear.default: linear, aten.addmm.default: addmm,
}  # fmt: skip
"""By op; "pointwise" for all pointwise rows of the op table."""
