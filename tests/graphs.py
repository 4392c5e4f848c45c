"""Small graphs for the tests of the passes.

In: a function and example tensors. Out: its captured graph, canonical or not, and its calls by
name, for example::

    calls(captured_graph(lambda x: x.dropout(0.1) + 0, x))  ->  ["add"]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from turbotx.capture.callables import FunctionModule
from turbotx.capture.trace import Captured, capture
from turbotx.passes.partition import op_name


def captured(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Captured:
    """Capture a function of tensors as `turbotx.optimize` would."""
    return capture(FunctionModule(function), args, kwargs)


def captured_graph(function: Callable[..., Any], *args: Any) -> fx.Graph:
    return captured(function, *args).graph_module.graph


def calls(graph: fx.Graph) -> list[str]:
    """The plain names of a graph's tensor calls, in order; sizes and getitems left out."""
    tensors = [n for n in graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    return [op_name(n) for n in tensors if n.op == "call_function"]


def node(graph: fx.Graph, name: str) -> fx.Node:
    """The node called `name`."""
    return next(n for n in graph.nodes if n.name == name)
