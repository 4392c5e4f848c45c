"""Operands of attention: removes repeated key heads and scales that the kernel applies itself.

In: the q, k or v of an attention in the graph. Out: the tensor without key heads repeated for
groups of query heads, and without a scale, for example::

    reshape(expand(unsqueeze(k, 2)))  ->  k, one head per group    q * 0.125  ->  q and 0.125
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.views import SPLITS, is_view

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def share_heads(node: Any) -> Any:
    """Return (batch, kv_heads, len, head_dim) if `node` repeats these heads for groups of queries;
    otherwise `node`."""
    if not g.is_call(node, *RESHAPES) or not g.is_call(node.args[0], aten.expand.default):
        return node
    wide = node.args[0]
    thin = wide.args[0]
    if not g.is_call(thin, aten.unsqueeze.default) or thin.args[1] != 2:
        return node
    kept = g.shape(thin.args[0])
    repeated = g.shape(wide)
    if len(kept) != 4 or repeated != (*kept[:2], repeated[2], *kept[2:]):
        return node
    grouped = (kept[0], kept[1] * repeated[2], *kept[2:])
    return thin.args[0] if g.shape(node) == grouped else node


def take_narrow(node: Any, dtype: torch.dtype) -> Any:
    """Return a float32 tensor as it was before its conversion from `dtype`, which views may show;
    None if there was none. Emits the views anew."""
    if g.dtype(node) is dtype:
        return node
    if not node.args or g.dtype(node) is not torch.float32:
        return None
    if g.is_call(node, aten._to_copy.default):
        return take_narrow(node.args[0], dtype) if g.dtype(node.args[0]) is dtype else None
    if not is_view(node) or node.args[0].target in SPLITS:
        return None
    inner = take_narrow(node.args[0], dtype)
    return None if inner is None else g.emit(node, node.target, inner, *node.args[1:])


def take_hidden(mask: Any) -> tuple[fx.Node, fx.Node | None] | None:
    """Return (visible, bias) of a float mask where(visible, bias, most negative float), or None.

    bias is None if it is the number 0.
    """
    if not g.is_call(mask, aten.where.self):
        return None
    visible, bias, low = mask.args
    if number_in(low) != torch.finfo(g.dtype(mask)).min or g.dtype(visible) is not torch.bool:
        return None
    return visible, None if number_in(bias) == 0 else bias


def number_in(node: Any) -> Any:
    """Return the number that a one-element tensor was created from; None for others."""
    if g.is_call(node, aten.scalar_tensor.default):
        number = node.args[0]
    elif g.is_call(node, aten.full.default) and all(n == 1 for n in g.shape(node)):
        number = node.args[1]
    else:
        return None
    return number if isinstance(number, (int, float)) else None


def take_scale(q: Any) -> tuple[Any, float]:
    """Return q without its multiplication by a number, and the number, if q is the only user.

    The kernel scales in float32, which saves one rounding.
    """
    node = q
    while is_view(node) and node.args[0].target not in SPLITS and len(node.users) == 1:
        node = node.args[0]
    if not g.is_call(node, aten.mul.Tensor) or len(node.users) != 1:
        return q, 1.0
    x, factor = node.args
    if not isinstance(factor, (int, float)) or not g.is_tensor(x) or g.dtype(x) != g.dtype(node):
        return q, 1.0
    if node is q:
        return x, float(factor)
    assert isinstance(x, fx.Node)
    node.replace_all_uses_with(x)
    return q, float(factor)
