"""Returned: flattens a model's output for tracing and rebuilds it in every call.

In: the output of a model's forward under a trace. Out: leaves that a graph can return, the
structure around them, and the constants that are neither tensors nor numbers::

    take_apart((x, x.shape, x.dtype), "")  ->  [x, 2, 3, None], (*, Extents(*, *), *), {3: float32}
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from turbotx.capture.sandbox.noted_dict import NotedDict
from turbotx.capture.traced_float import TracedFloat
from turbotx.errors import CaptureError

_LEAVES = (
    torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float, str, type(None),
)  # fmt: skip
_CONSTANTS = (
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.finfo, torch.iinfo,
    complex, bytes, range, type(Ellipsis), enum.Enum, type,
)  # fmt: skip
"""Immutable types that contain no tensor."""


class Extents(tuple[Any, ...]):
    """A torch.Size whose numbers are known only at call time; PyTorch would make it a tuple."""


def _to_size(values: Any, context: Any = None) -> Any:
    values = tuple(values)
    return torch.Size(values) if all(type(v) is int for v in values) else Extents(values)


pytree.register_pytree_node(
    Extents, lambda size: (list(size), None), _to_size, serialized_type_name="turbotx.Extents"
)


def _without_own_classes(tree: Any) -> Any:
    """Return an output with plain dicts in place of the dicts used under the trace, and with sizes
    in a form that pytree keeps."""

    def change(value: Any) -> Any:
        if isinstance(value, torch.Size):
            return Extents(value)
        if isinstance(value, NotedDict):
            return {k: _without_own_classes(v) for k, v in value.items()}
        return value

    return pytree.tree_map(change, tree, is_leaf=lambda x: isinstance(x, (torch.Size, NotedDict)))


class ReturnedObjectError(CaptureError):
    """An output contains an object of a class, `kind`, that a program cannot create."""

    def __init__(self, leaf: Any, name: str) -> None:
        super().__init__(_refusal(leaf, name))
        self.kind: type = type(leaf)


def take_apart(output: Any, name: str) -> tuple[list[Any], pytree.TreeSpec, dict[int, Any]]:
    """Return the leaves, their structure, and the constants, which are None among the leaves. A NaN
    is one of these: torch.export finds no number that it is equal to.

    Raises ReturnedObjectError for an object that may hold tensors that pytree does not see.
    """

    leaves, spec = pytree.tree_flatten(_without_own_classes(output))
    constants: dict[int, Any] = {}
    for k, leaf in enumerate(leaves):
        nan = type(leaf) is not TracedFloat and isinstance(leaf, float) and math.isnan(leaf)
        if isinstance(leaf, _LEAVES) and not nan:
            continue
        if not (nan or is_constant(leaf)):
            raise ReturnedObjectError(leaf, name)
        constants[k], leaves[k] = leaf, None
    return leaves, spec, constants


def is_constant(value: Any) -> bool:
    """Return whether an object is the same in every call: plain, and without a tensor inside."""
    if isinstance(value, slice):
        return all(type(v) in (int, type(None)) for v in (value.start, value.stop, value.step))
    if isinstance(value, (set, frozenset)):
        return all(type(v) in (bool, int, float, str) or is_constant(v) for v in value)
    return isinstance(value, _CONSTANTS)


def _refusal(leaf: Any, name: str) -> str:
    kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}".removeprefix("builtins.")
    return (
        f"cannot capture {name}: its output holds a {kind}, and what is in there would stay as it "
        "was at the first call. Return tensors, numbers and strings in tuples, lists, dicts or "
        "named tuples (for a decoder pass use_cache=False), or register the class with "
        "torch.utils._pytree.register_pytree_node"
    )


def put_constants(graph: fx.Graph, constants: Mapping[int, Any]) -> None:
    """Put constants that tracing cannot return, such as a dtype, in their places in the output, in
    place."""
    (node,) = graph.find_nodes(op="output")
    node.args = ([constants.get(k, leaf) for k, leaf in enumerate(node.args[0])],)
