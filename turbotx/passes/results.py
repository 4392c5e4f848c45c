"""Results: replaces ops with several outputs by one op for each output that is used.

In: a captured ATen graph. Out: the same graph without the ops below, so that the op table and the
other passes see one op per result, for example::

    max.dim(x, 1)[0], max.dim(x, 1)[1]  ->  amax(x, [1]), argmax(x, 1)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from turbotx.ir import fx_nodes as g

aten = torch.ops.aten

# Returns a node for result `k` of a call, emitted before it, or None if no op computes it.
Piece = Callable[[fx.Node, fx.Node, int], fx.Node | None]


def use_single_results(graph: fx.Graph) -> None:
    """Replace, in place, every call in the table if each of its used results has its own op."""
    for node in list(graph.nodes):
        piece = _PIECES.get(node.target)
        if piece is None or not node.users:
            continue
        users = list(node.users)
        if not all(g.is_call(u, g.GETITEM) for u in users):
            continue
        with graph.inserting_before(node):
            made = [piece(u, node, u.args[1]) for u in users]
            if None in made:
                continue  # nodes made so far are dead code
            for user, new in zip(users, made, strict=True):
                assert new is not None
                if g.dtype(new) != g.dtype(user):
                    new = g.emit(user, aten._to_copy.default, new, dtype=g.dtype(user))
                g.replace(user, new)
        graph.erase_node(node)


def _extreme(value: Any, place: Any) -> Piece:
    def piece(like: fx.Node, node: fx.Node, k: int) -> fx.Node:
        x, d, keep = node.args[0], g.argument(node, "dim"), bool(g.argument(node, "keepdim"))
        if k == 1:
            if g.dtype(g.operand(node, 0)) is torch.bool:  # of which PyTorch has no argmax
                x = g.emit(like, aten._to_copy.default, x, dtype=torch.uint8)
            return g.emit(like, place, x, d, keep)
        return g.emit(like, value, x, [d], keep)

    return piece


def _variance_and_mean(variance: Any) -> Piece:
    def piece(like: fx.Node, node: fx.Node, k: int) -> fx.Node:
        x, dims, keep = node.args[0], g.argument(node, "dim"), bool(g.argument(node, "keepdim"))
        if k == 0:
            correction = g.argument(node, "correction")
            return g.emit(like, variance, x, dims, correction=correction, keepdim=keep)
        return g.emit(like, aten.mean.dim, x, dims, keep)

    return piece


def _statistic(like: fx.Node, x: Any, dims: list[int], eps: Any, k: int) -> fx.Node:
    """Return the mean (k = 1) or the reciprocal standard deviation (k = 2) that a norm also
    returns."""
    if k == 1:
        return g.emit(like, aten.mean.dim, x, dims, True)
    variance = g.emit(like, aten.var.correction, x, dims, correction=0, keepdim=True)
    return g.emit(like, aten.rsqrt.default, g.emit(like, aten.add.Scalar, variance, eps))


def _layer_norm(like: fx.Node, node: fx.Node, k: int) -> fx.Node:
    given: Any = node.args
    x, shape, weight, bias, eps = given
    if k == 0:
        return g.emit(like, aten.layer_norm.default, x, shape, weight, bias, eps)
    return _statistic(like, x, [-d - 1 for d in range(len(shape))], eps, k)


def _group_norm(like: fx.Node, node: fx.Node, k: int) -> fx.Node:
    given: Any = node.args
    x, weight, bias, batch, channels, places, groups, eps = given
    if k == 0:
        return g.emit(like, aten.group_norm.default, x, groups, weight, bias, eps)
    within: Any = -1
    if batch == 0 and isinstance(channels, int) and isinstance(places, int):
        within = channels * places // groups
    rows = g.emit(like, aten.view.default, x, [batch, groups, within])
    found = _statistic(like, rows, [2], eps, k)
    return g.emit(like, aten.squeeze.dims, found, [2])


def _batch_norm(like: fx.Node, node: fx.Node, k: int) -> fx.Node | None:
    """With running statistics, a batch norm is a scale and shift per channel."""
    if k:
        return None  # empty tensors
    x, weight, bias, mean, variance, _, eps = node.args
    rank = len(g.shape(g.operand(node, 0)))

    def per_channel(value: Any) -> fx.Node:
        return g.emit(like, aten.view.default, value, [-1] + [1] * (rank - 2))

    spread = g.emit(like, aten.add.Scalar, per_channel(variance), eps)
    centred = g.emit(like, aten.sub.Tensor, x, per_channel(mean))
    value = g.emit(like, aten.mul.Tensor, centred, g.emit(like, aten.rsqrt.default, spread))
    if weight is not None:
        value = g.emit(like, aten.mul.Tensor, value, per_channel(weight))
    return value if bias is None else g.emit(like, aten.add.Tensor, value, per_channel(bias))


def _attention(like: fx.Node, node: fx.Node, k: int) -> fx.Node | None:
    """Return SDPA in place of its decomposition for CPUs; None for its second result, which is for
    training only, and with dropout."""
    dropout, causal = g.argument(node, "dropout_p"), g.argument(node, "is_causal")
    mask, scale = g.argument(node, "attn_mask"), g.argument(node, "scale")
    if k or dropout:
        return None
    target = aten.scaled_dot_product_attention.default
    return g.emit(like, target, *node.args[:3], mask, 0.0, causal, scale=scale)


_PIECES: dict[Any, Piece] = {
    aten.max.dim: _extreme(aten.amax.default, aten.argmax.default),
    aten.min.dim: _extreme(aten.amin.default, aten.argmin.default),
    aten.var_mean.correction: _variance_and_mean(aten.var.correction),
    aten.std_mean.correction: _variance_and_mean(aten.std.correction),
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
}
