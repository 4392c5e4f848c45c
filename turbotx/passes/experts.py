"""Experts: rewrites routing of rows to experts to one op, and their products to another.

In: a canonical graph. Out: PyTorch's and transformers' grouped products as `grouped_linear`. A sort
of chosen experts whose users need only row counts and the inverse order becomes one `route`, which
needs no sort, for example::

    sort(chosen), cumsum(histc(sorted)), index_put(empty, order, arange)  ->  route(chosen)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.expert_ops import grouped_linear, route
from turbotx.ir.views import is_view, view_source

aten = torch.ops.aten
_SORTS = (aten.sort.default, aten.sort.stable)
# The dtypes that represent every expert's index exactly.
_EXACT = (torch.float32, torch.float64, torch.int32, torch.int64)


def use_experts(graph: fx.Graph) -> None:
    """Rewrite grouped products and the sorts that go with them, in place."""
    for node in list(graph.nodes):
        if _is_grouped_product(node):
            x, weight, ends = (g.operand(node, k) for k in range(3))
            with graph.inserting_before(node):
                rows = g.emit(node, aten.permute.default, weight, [0, 2, 1])
                g.replace(node, g.emit(node, grouped_linear, x, rows, ends))
        elif g.is_call(node, *_SORTS):
            _use_route(node)


def _is_grouped_product(node: fx.Node) -> bool:
    """Return whether a call is a grouped product, out[rows of e] = x[rows of e] weight[e], with
    rows given by ends."""
    name = str(node.target)  # transformers' op exists only if transformers is imported
    if name == "aten._grouped_mm.default":
        if g.argument(node, "bias") is not None:
            return False
        if g.argument(node, "out_dtype") not in (None, g.dtype(g.operand(node, 0))):
            return False
    elif name not in ("turbotx.grouped_mm.default", "transformers.grouped_mm_fallback.default"):
        return False
    given = [n for n in (*node.args, *node.kwargs.values()) if n is not None]
    if len(given) != 3 or len(node.args) != 3:
        return False
    x, weight, ends = (g.tensor(g.operand(node, k)) for k in range(3))
    one_dtype = x.dtype == weight.dtype == g.dtype(node)
    return (x.dim(), weight.dim(), ends.dtype) == (2, 3, torch.int32) and one_dtype


def _use_route(sort: fx.Node) -> None:
    """Replace a sort of chosen experts by `route`, if besides the sorted values only the order, its
    inverse and the ends of the experts' rows are used."""
    chosen = g.operand(sort, 0)
    pieces = {u.args[1]: u for u in sort.users if g.is_call(u, g.GETITEM)}
    known = _choices(chosen)
    if known is None or set(pieces) != {0, 1} or g.argument(sort, "descending"):
        return
    values, order = pieces[0], pieces[1]
    ends = [(u, n) for u, n in _ends_of(values) if n >= known]
    inverses = [u for u in order.users if _is_inverse(u, order)]
    if not ends or not inverses:
        return
    experts = ends[0][1]
    with sort.graph.inserting_before(sort):
        made = g.emit(sort, route, chosen, experts=experts)
        pieces_of_it = [g.emit_piece(sort, made, k) for k in range(3)]
        in_order = g.emit(values, aten.index.Tensor, chosen, [pieces_of_it[0]])
    g.replace(values, in_order)
    for inverse in inverses:
        g.replace(inverse, pieces_of_it[1])
    for end, count in ends:
        if count == experts:
            g.replace(end, pieces_of_it[2])
    g.replace(order, pieces_of_it[0])


def _choices(chosen: fx.Node) -> int | None:
    """Return the number of experts if `chosen`, int64 (rows,), comes from `topk`, so that it only
    contains indices below that number; otherwise None."""
    if len(g.shape(chosen)) != 1 or g.dtype(chosen) is not torch.int64:
        return None
    root = chosen
    while is_view(root):
        root = view_source(root)
    if not g.is_call(root, g.GETITEM) or root.args[1] != 1:
        return None
    topk = g.operand(root, 0)
    if not g.is_call(topk, aten.topk.default):
        return None
    width = g.shape(g.operand(topk, 0))[g.argument(topk, "dim")]
    return int(width) if width.is_Integer else None


def _ends_of(values: fx.Node) -> list[tuple[fx.Node, int]]:
    """Return the int32 cumulative counts of 0, 1, 2, ... among `values`, each with the number of
    bins."""
    found: list[tuple[fx.Node, int]] = []
    left = [values]
    while left:
        for user in left.pop().users:
            if g.is_call(user, aten._to_copy.default) and g.dtype(user) in _EXACT:
                left.append(user)
            elif g.is_call(user, aten.histc.default) and _counts_each(user):
                count = int(g.argument(user, "bins"))
                found += [(u, count) for u in user.users if _is_running_sum(u)]
    return found


def _counts_each(histc: fx.Node) -> bool:
    """Return whether the bins of a histc call are the integers from 0 on."""
    bins, least, most = (g.argument(histc, name) for name in ("bins", "min", "max"))
    return isinstance(bins, int) and bins > 1 and (least, most) == (0, bins - 1)


def _is_running_sum(node: fx.Node) -> bool:
    if not g.is_call(node, aten.cumsum.default) or len(g.shape(node)) != 1:
        return False
    return g.dtype(node) is torch.int32


def _is_inverse(node: fx.Node, order: fx.Node) -> bool:
    """Return whether a call writes k to index order[k] for every k. The initial contents do not
    matter, since all are overwritten."""
    if not g.is_call(node, aten.index_put.default) or g.argument(node, "accumulate"):
        return False
    given: Any = node.args
    into, places, written = given[:3]
    if list(places) != [order] or g.shape(into) != g.shape(order):
        return False
    return _counts_up(written) and g.shape(written) == g.shape(order)


def _counts_up(node: Any) -> bool:
    """Return whether a tensor is 0, 1, 2, ... in int64."""
    if not g.is_tensor(node) or g.dtype(node) is not torch.int64:
        return False
    if not g.is_call(node, aten.arange.start_step):
        return False
    return node.args[0] == 0 and (len(node.args) < 3 or node.args[2] == 1)
