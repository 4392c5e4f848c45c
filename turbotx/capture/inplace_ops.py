"""In-place ops: replaces them in a traced graph by the ops that make a new tensor.

In: an exported graph, before its composite ops are taken apart. Out: the same graph, in which what
changed a tensor that only the graph itself has, and has no view of, is the op without the change::

    y = mul(x, 2); add_(y, 1); relu(y)  ->  y = mul(x, 2); z = add(y, 1); relu(z)

Others stay: a trace of the whole takes those apart, which takes as long as the first one did.
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
"""Composite ops whose result is never their argument, as that of others (dropout) may be."""


def write_out_of_place(graph: fx.Graph) -> None:
    """Replace each op that changes a tensor in place by the one that does not, where nothing else
    sees the change: no view made before it, no input, no parameter."""
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
        node.target = op  # its value stays as it is, laid out as the tensor that was changed
        changed.replace_all_uses_with(node, lambda n, at=place[node]: place[n] > at)


def _find_other(node: fx.Node) -> OpOverload | None:
    """Return the op that an in-place one is without the change of its first argument."""
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
    """Return whether a call's results are tensors of their own, or no tensors."""
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
