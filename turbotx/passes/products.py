"""Products: uses turbotx's product kernels for attention that no attention kernel computes.

In: a graph after `recognize_attention`. Out: matmuls that feed a softmax, and matmuls of the
softmax's result, as `attention_scores` and `attention_values`. Everything between them is one
region, and the second product writes heads side by side, for example::

    matmul(softmax(matmul(q, k^T) * b + c), v)
      ->  permute(attention_values(softmax(attention_scores(q, k) * b + c), v))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.attention_ops import attention_scores, attention_values
from turbotx.ir.views import is_view
from turbotx.ops import is_computed
from turbotx.passes.chains import PRODUCTS, SOFTMAXES

aten = torch.ops.aten


def use_products(graph: fx.Graph) -> None:
    """Rewrite the products before and after each remaining softmax over keys."""
    for node in list(graph.nodes):
        if not g.is_call(node, *SOFTMAXES) or node.args[1] not in (-1, len(g.shape(node)) - 1):
            continue
        scores = _find_scores(node.args[0], g.shape(node)[-2:])
        if not scores or not all(_fits(n) and _has_width(n, 0) for n in scores):
            continue
        for product in scores:
            _write_scores(product)
        converted = [u for u in node.users if g.is_call(u, aten._to_copy.default)]
        for shares in (node, *converted):
            for reader in list(shares.users):
                second = g.is_call(reader, *PRODUCTS) and reader.args[0] is shares
                if second and _fits(reader) and _has_width(reader, 1):
                    _write_values(reader)


def _find_scores(x: Any, lengths: tuple[Any, ...]) -> list[fx.Node]:
    """Return the products of shape (queries, keys) from which a region computes `x`."""
    found: dict[fx.Node, None] = {}
    seen, stack = set(), [x]
    while stack:
        x = stack.pop()
        if not g.is_tensor(x) or x in seen or g.shape(x)[-2:] != lengths:
            continue
        seen.add(x)
        if g.is_call(x, *PRODUCTS):
            found[x] = None
        elif is_computed(x) and not is_view(x):
            stack += x.all_input_nodes
    return list(found)


def _fits(product: fx.Node) -> bool:
    """Return whether a kernel supports it: (batch, heads, rows, n) by (batch, heads, n,
    columns)."""
    a, b = (g.operand(product, i) for i in range(2))
    shapes, dtypes = (g.shape(a), g.shape(b)), {g.dtype(a), g.dtype(b)}
    if len(shapes[0]) != 4 or len(shapes[1]) != 4 or shapes[0][:2] != shapes[1][:2]:
        return False
    return dtypes in ({torch.float32}, {torch.bfloat16}, {torch.float16})


def _has_width(product: fx.Node, position: int) -> bool:
    """Return whether the last size of an operand is constant; kernels are compiled for it."""
    width = g.shape(g.operand(product, position))[3]
    return bool(width.is_Integer) and width != 0


def _write_scores(product: fx.Node) -> None:
    with product.graph.inserting_before(product):
        q, k_t = (g.operand(product, i) for i in range(2))
        k = g.emit(product, aten.permute.default, k_t, [0, 1, 3, 2])
        new = g.emit(product, attention_scores, q, k)
        if g.dtype(product) is not torch.float32:
            new = g.emit(product, aten._to_copy.default, new, dtype=g.dtype(product))
    g.replace(product, new)


def _write_values(product: fx.Node) -> None:
    with product.graph.inserting_before(product):
        new = g.emit(product, attention_values, *product.args)
        new = g.emit(product, aten.permute.default, new, [0, 2, 1, 3])
    g.replace(product, new)
