"""Cache: lets attention read keys and values in the cache's memory.

In: a graph with recognised attention and appends to a cache. Out: the same graph, in which an
append that only attention kernels read (they accept any strides) returns no copy::

    attention(q, cache_append(memory, k, ...), v)  ->  attention(q, cache_store(memory, k, ...), v)
"""

from __future__ import annotations

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.attention_ops import attention
from turbotx.ir.cache_ops import cache_store
from turbotx.ir.strides import layout_of
from turbotx.ir.views import is_view


def store_in_place(graph: fx.Graph) -> None:
    """Replace appends that only attention reads by in-place stores."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.turbotx.cache_append.default):
        if all(_reads_in_place(user, node) for user in node.users):
            *held, layer, part = node.args
            with graph.inserting_before(node):
                new = g.emit(node, cache_store, *held, 2 * layer + part)
            g.replace(node, new)


def _reads_in_place(user: fx.Node, source: fx.Node) -> bool:
    """Return whether `user`, possibly through views with the same layout, is an attention that
    takes `source` as k or v."""
    if g.is_size(user):
        return True
    if user.target is attention:
        return source not in (user.args[0], *user.args[3:])
    return (
        is_view(user)
        and layout_of(user) == layout_of(source)
        and all(_reads_in_place(further, user) for further in user.users)
    )
