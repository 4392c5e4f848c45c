"""In-place ops: replaces them in a traced graph by the ops that return a new tensor.

In: an exported graph, before decomposition. Out: the same graph, in which an in-place op on a
tensor that only the graph holds, and that has no view, is its out-of-place variant::

    y = mul(x, 2); add_(y, 1); relu(y)  ->  y = mul(x, 2); z = add(y, 1); relu(z)

Others stay: they are decomposed by a trace of the whole, which takes as long as the first trace.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload

from turbotx.capture.casts import inside

aten = torch.ops.aten
_NEW = frozenset(("aten.linear.default", "aten.matmul.default", "aten.layer_norm.default",
                  "aten.softmax.int"))  # fmt: skip
"""Composite ops whose result never aliases their argument; that of others (dropout) may."""


def write_out_of_place(graph: fx.Graph) -> None:
    """Replace in-place ops by their out-of-place variants where nothing else observes the change:
    no earlier view, no input, no parameter."""
    place = {node: k for k, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        op = _find_other(node)
        changed: Any = node.args[0] if node.args else None
        if op is None or not _makes_new(changed) or not hasattr(changed.meta["val"], "fake_mode"):
            continue
        earlier = [n for n in changed.users if place[n] < place[node]]
        if not all(map(_makes_new, earlier)):
            continue
        if _compute(op, node).dtype != changed.meta["val"].dtype:
            continue
        node.target = op  # its value stays: the layout is that of the modified tensor
        changed.replace_all_uses_with(node, lambda n, at=place[node]: place[n] > at)


def _find_other(node: fx.Node) -> OpOverload | None:
    """Return the out-of-place variant of an in-place op."""
    target: Any = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload):
        return None
    name, changes = target._opname, [a for a in target._schema.arguments if a.is_write]
    in_place = name.endswith("_") and not name.endswith("__") and target.namespace == "aten"
    if not in_place or len(changes) != 1 or torch.Tag.nondeterministic_seeded in target.tags:
        return None
    found = getattr(getattr(aten, name[:-1], None), target._overloadname, None)
    return found if found is not None and found is not aten.copy.default else None


def _makes_new(node: Any) -> bool:
    """Return whether a call's results are new tensors, or not tensors."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, OpOverload):
        return False
    op = node.target
    shared = [a for a in (*op._schema.arguments, *op._schema.returns) if a.alias_info is not None]
    if shared or "unsafe" in op._opname:
        return False
    if not isinstance(node.meta.get("val"), (torch.Tensor, torch.SymInt, int)):
        return False
    if op is aten.einsum.default:  # of one operand it is a view
        operands: Any = node.args[1]
        return len(operands) > 1
    return str(op) in _NEW or not op._can_decompose()


def _compute(op: OpOverload, node: fx.Node) -> Any:
    args: Any
    kwargs: Any
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with torch.no_grad(), enable_python_dispatcher(), args[0].fake_mode, inside(op):
        return op(*args, **kwargs)
