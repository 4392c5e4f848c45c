"""Linear: rewrites matrix products to `linear`, packs projections of one tensor, splits off biases.

In: a canonical graph. Out: Q, K and V (and gate and up) as pieces of one `linear` over the
concatenated weights, and `linear(x, w, b)` as `linear(x, w) + b` wherever a kernel follows that can
add the bias at no cost, for example::

    linear(x, wq), linear(x, wk), linear(x, wv)  ->  split(linear(x, cat(wq, wk, wv)))
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import Expr, product
from turbotx.ir.strides import has_plain_rows, layout_of
from turbotx.ir.views import is_view
from turbotx.ops import is_computed

aten = torch.ops.aten


def use_multiplication(graph: fx.Graph) -> None:
    """Rewrite products with a reduced size of 1, (.., m, 1) @ (.., 1, n), to multiplications.

    Rotary embeddings compute their angles this way; a GEMM would split the region around it.
    """
    for node in list(graph.nodes):
        if not g.is_call(node, aten.mm.default, aten.bmm.default, aten.matmul.default):
            continue
        column, row = (g.shape(n) for n in node.args)
        if min(len(column), len(row)) < 2 or not column[-1] == row[-2] == 1:
            continue
        with graph.inserting_before(node):
            g.replace(node, g.emit(node, aten.mul.Tensor, *node.args))


def use_linear(graph: fx.Graph) -> None:
    """Rewrite addmm(bias, x, w), mm(x, w) and matmul(x, w) with a weight to linear(x, w^T, bias),
    and bmm of one matrix by one weight, which einsum produces."""
    for node in list(graph.nodes):
        if g.is_call(node, aten.bmm.default):
            _use_linear_alone(node)
            continue
        if g.is_call(node, aten.addmm.default) and not node.kwargs:
            bias, x, weight = node.args
        elif g.is_call(node, aten.mm.default, aten.matmul.default):
            bias, (x, weight) = None, node.args
        else:
            continue
        if not is_weight(weight) or (bias is not None and len(g.shape(bias)) != 1):
            continue
        if len(g.shape(weight)) != 2 or len(g.shape(x)) < 2:
            continue
        with graph.inserting_before(node):
            flipped = g.emit(node, aten.permute.default, weight, [1, 0])
            if bias is None or g.shape(bias) == g.shape(weight)[1:]:
                args = (x, flipped) if bias is None else (x, flipped, bias)
                new = g.emit(node, aten.linear.default, *args)
            else:  # one number for all columns, which linear does not support
                new = g.emit(node, aten.linear.default, x, flipped)
                new = g.emit(node, aten.add.Tensor, new, bias)
            g.replace(node, new)


def _use_linear_alone(node: fx.Node) -> None:
    """Rewrite bmm((1, n, k), (1, k, m)) with a weight to linear((n, k), (m, k)).

    Each gets its own view of x, so that they are not packed: einsum then merges heads into the
    batch, for which pieces of a packed result would have to be copied.
    """
    x, weight = g.operand(node, 0), g.operand(node, 1)
    if not is_weight(weight) or g.shape(weight)[0] != 1:
        return
    with node.graph.inserting_before(node):
        flat, matrix = (g.emit(node, aten.squeeze.dim, n, 0) for n in (x, weight))
        flipped = g.emit(node, aten.permute.default, matrix, [1, 0])
        product = g.emit(node, aten.linear.default, flat, flipped)
        g.replace(node, g.emit(node, aten.unsqueeze.default, product, 0))


def lift_views(graph: fx.Graph) -> None:
    """Apply a linear to (batch, seq, k) directly instead of to its view as (batch * seq, k), so
    that no reshape is left between a kernel and its GEMM."""
    for node in list(graph.nodes):
        if not g.is_call(node, aten.linear.default):
            continue
        x = node.args[0]
        if not g.is_call(x, aten.view.default, aten.reshape.default):
            continue
        inner = x.args[0]
        if g.shape(inner)[-1:] != g.shape(x)[-1:]:
            continue
        views = [u for u in node.users if g.is_call(u, aten.view.default, aten.reshape.default)]
        wanted = (*g.shape(inner)[:-1], g.shape(node)[-1])
        if len(views) != len(node.users) or not all(g.shape(v) == wanted for v in views):
            continue
        with graph.inserting_before(node):
            new = g.emit(node, aten.linear.default, inner, *node.args[1:])
        for view in views:
            g.replace(view, new)
        graph.erase_node(node)


def lift_permutations(graph: fx.Graph) -> None:
    """Move permutations of rows from a linear's input to its output.

    For example of (seq, batch, k) transposed, or of attention's (batch, seq, heads, head_dim) in a
    model with the sequence first. A GEMM's rows may be in any order, and kernels read them in
    another at no cost.
    """
    for node in list(graph.nodes):
        if not g.is_call(node, aten.linear.default):
            continue
        x: Any = node.args[0]
        layout = layout_of(x)
        if (layout is not None and has_plain_rows(layout)) or _is_returned(node):
            continue
        merged = g.is_call(x, aten.view.default, aten.reshape.default)
        turned = x.args[0] if merged else x
        if not g.is_call(turned, aten.permute.default):
            continue
        source, order = turned.args
        last = _count_trailing(g.shape(source), g.shape(x)[-1])
        rank = len(order)
        kept = list(range(rank - last, rank))
        if not last or [d % rank for d in order[rank - last :]] != kept:
            continue
        with graph.inserting_before(node):
            if last > 1:
                source = g.emit(node, aten.flatten.using_ints, source, rank - last, -1)
            rows = g.emit(node, aten.linear.default, source, *node.args[1:])
            lead = [d % rank for d in order[: rank - last]]
            new = g.emit(node, aten.permute.default, rows, [*lead, len(lead)])
            if merged:
                sizes = [*x.args[1][:-1], int(g.shape(rows)[-1])]
                new = g.emit(node, aten.reshape.default, new, sizes)
            g.replace(node, new)


def _is_returned(node: fx.Node) -> bool:
    """Return whether a node's elements are returned to the caller, and must be contiguous."""
    return any(u.op == "output" or (is_view(u) and _is_returned(u)) for u in node.users)


def _count_trailing(shape: tuple[Expr, ...], size: Expr) -> int:
    """Return how many of the last dims have the product `size`; 0 if none do."""
    for count in range(1, len(shape) + 1):
        if product(shape[-count:]) == size:
            return count
    return 0


def pack_linears(graph: fx.Graph, apart: Callable[[fx.Node], Hashable] | None = None) -> None:
    """Merge linears of one input into one GEMM, if all or none have a bias.

    Computed biases are not merged: they could depend on another of the linears.
    apart: a key for each weight; only weights with equal keys are merged.
    """
    groups: dict[tuple[fx.Node, bool, Hashable], list[fx.Node]] = {}
    for node in graph.nodes:
        if g.is_call(node, aten.linear.default) and all(is_weight(n) for n in node.args[1:]):
            key = (
                node.args[0],
                _bias(node) is not None,
                None if apart is None else apart(g.operand(node, 1)),
            )
            groups.setdefault(key, []).append(node)
    for (_, biased, _), linears in groups.items():
        dtypes = {g.dtype(g.operand(n, 1)) for n in linears}
        if len(linears) < 2 or len(dtypes) > 1:
            continue
        widths = [int(g.shape(n)[-1]) for n in linears]
        first = linears[0]
        x = first.args[0]  # current input: merging an earlier group may have replaced it
        for node in linears:
            for position in range(1, len(node.args)):
                _move_before(first, g.operand(node, position))
        with graph.inserting_before(first):
            weight = g.emit(first, aten.cat.default, [n.args[1] for n in linears])
            args = [x, weight]
            if biased:
                args.append(g.emit(first, aten.cat.default, [_bias(n) for n in linears]))
            packed = g.emit(first, aten.linear.default, *args)
            pieces = g.emit(first, aten.split_with_sizes.default, packed, widths, -1)
            parts = [g.emit_piece(first, pieces, k) for k in range(len(linears))]
        for node, part in zip(linears, parts, strict=True):
            g.replace(node, part)


def _move_before(first: fx.Node, weight: fx.Node) -> None:
    """Move views of a parameter before a call that now reads them earlier."""
    if weight.op == "call_function" and first < weight:
        for source in weight.all_input_nodes:
            _move_before(first, source)
        first.prepend(weight)


def free_biases(graph: fx.Graph) -> None:
    """Rewrite linear(x, w, b) to linear(x, w) + b if every use ends in a fused kernel."""
    for node in list(graph.nodes):
        if not g.is_call(node, aten.linear.default) or _bias(node) is None:
            continue
        if not node.users or not all(_ends_in_kernel(u) for u in node.users):
            continue
        with graph.inserting_before(node):
            bare = g.emit(node, aten.linear.default, *node.args[:2])
            g.replace(node, g.emit(node, aten.add.Tensor, bare, _bias(node)))


def _bias(node: fx.Node) -> fx.Node | None:
    return g.optional(node, 2)


def is_weight(node: object) -> bool:
    """Return whether a node is a parameter, or a view or concatenation of parameters."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "get_attr":
        return True
    if is_view(node) or g.is_call(node, aten.cat.default):
        return all(is_weight(n) for n in node.all_input_nodes)
    return False


def _ends_in_kernel(user: fx.Node) -> bool:
    if is_view(user) or user.target is aten.split_with_sizes.default:
        return bool(user.users) and all(_ends_in_kernel(u) for u in user.users)
    return is_computed(user)
