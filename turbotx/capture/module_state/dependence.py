"""Dependence: whether a tensor under a trace was computed from the values of the inputs.

In: a tensor under a trace, and the call's tensors. Out: False if it follows from sizes, constants
and parameters alone, as a cached mask does; every later call would compute the same::

    depends_on_values(torch.ones(x.shape[1]).tril(), [x])  ->  False
    depends_on_values(x * 2, [x])                          ->  True
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental import proxy_tensor

_SIZES = ("sym_size", "sym_stride", "sym_numel", "sym_storage_offset")


def depends_on_values(value: torch.Tensor, inputs: Iterable[torch.Tensor]) -> bool:
    """Return whether `value` is computed from the contents of `inputs`; True if the trace cannot
    tell."""
    node = _node_of(value)
    if node is None:
        return True
    roots = {_node_of(x) for x in inputs}
    seen: set[fx.Node] = set()
    to_do = [node]
    while to_do:
        node = to_do.pop()
        if node in roots:
            return True
        if node not in seen and not str(node.target).startswith(tuple(f"aten.{s}" for s in _SIZES)):
            seen.add(node)
            to_do += node.all_input_nodes
    return False


def _node_of(tensor: torch.Tensor) -> fx.Node | None:
    """Return the node that computes a tensor in the graph being traced; PyTorch has no public API
    for it."""
    mode: Any = getattr(proxy_tensor, "get_proxy_mode", lambda: None)()
    find: Any = getattr(proxy_tensor, "get_proxy_slot", None)
    if mode is None or find is None:
        return None
    if torch._is_functional_tensor(getattr(tensor, "elem", tensor)):
        tensor = torch._from_functional_tensor(getattr(tensor, "elem", tensor))
    slot = find(tensor, mode.tracer, None)
    return None if slot is None else slot.proxy.node
