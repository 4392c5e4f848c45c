"""Subgraphs: converts ops that take graphs (torch.cond, while_loop, flex_attention) to plain calls.

In: an exported graph whose get_attr nodes name graphs. Out: the same graph, with each such op as
one call of tensors and sizes that contains its graphs and that PyTorch runs::

    cond(pred, true_graph_0, false_graph_0, (x, w))  ->  cond(pred, x, w)
"""

from __future__ import annotations

from typing import Any

import torch.utils._pytree as pytree
from torch import fx


class _Given(int):
    """The position of a tensor or size among a call's arguments."""


class WithGraphs:
    """A function of tensors and sizes: a PyTorch op with its graphs and constants bound."""

    def __init__(self, op: Any, args: Any, kwargs: Any) -> None:
        self.op, self._structure = op, (args, kwargs)
        self.__name__ = str(getattr(op, "__name__", op))

    def __call__(self, *given: Any) -> Any:
        """Call the op with these tensors and sizes in place of its variable arguments."""
        args, kwargs = pytree.tree_map(
            lambda v: given[v] if isinstance(v, _Given) else v, self._structure
        )
        return self.op(*args, **kwargs)

    def __str__(self) -> str:
        return f"higher_order.{self.__name__}"

    __repr__ = __str__


def enclose_graphs(graph_module: fx.GraphModule) -> None:
    """Replace every op that takes graphs, in place."""
    graph = graph_module.graph
    inner = {
        n: getattr(graph_module, str(n.target))
        for n in graph.find_nodes(op="get_attr")
        if isinstance(getattr(graph_module, str(n.target), None), fx.GraphModule)
    }
    for node in list(graph.nodes):
        if not any(n in inner for n in node.all_input_nodes):
            continue
        given: dict[fx.Node, _Given] = {}

        def place(value: fx.Node, given: dict[fx.Node, _Given] = given) -> Any:
            if value in inner:
                return inner[value]
            return given.setdefault(value, _Given(len(given)))

        args, kwargs = fx.node.map_arg((_plain(node.args), _plain(node.kwargs)), place)
        with graph.inserting_before(node):
            whole = graph.call_function(WithGraphs(node.target, args, kwargs), tuple(given))
        whole.meta = dict(node.meta)
        node.replace_all_uses_with(whole)
        graph.erase_node(node)
    for node in inner:
        graph.erase_node(node)


def _plain(value: Any) -> Any:
    """Return arguments as plain lists and tuples: fx stores lists of its own type."""
    if isinstance(value, (list, tuple)):
        made = [_plain(v) for v in value]
        return tuple(made) if isinstance(value, tuple) else made
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value
