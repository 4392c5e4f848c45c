"""Layer calls: what a call of a layer is given, and the nodes that a trace has made of it.

In: a tracer, a layer's arguments, the nodes that its code appended. Out: descriptions that are
equal for two calls only where the same code did the same with other tensors of equal kind::

    CallArguments.of(args, kwargs, node_of).described
    encode(nodes, roles)   ->  (("call_function", aten.linear.default, (arg 0, tensor 2), ...), ...)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

from turbotx.capture.equal_layers.layer_state import UnequalError
from turbotx.ir.fake_results import UnknownError, describe
from turbotx.ir.fx_nodes import draws
from turbotx.ir.memory_order import memory_of

NodeOf = Callable[[torch.Tensor], fx.Node]
_PLAIN = (
    int, bool, str, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout,
    torch.memory_format,
)  # fmt: skip
_FUNCTIONS = ("_operator", "builtins", "math", "torch")
"""Where functions of sizes lie that are no ops."""


@dataclass(frozen=True)
class CallArguments:
    """described: what to compare. tensors: the tensors among the leaves, in order."""

    described: Any
    tensors: tuple[FakeTensor, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], node_of: NodeOf) -> CallArguments:
        """Describe the arguments of a call under a trace. Raises UnequalError for what code could
        keep something in, or whose reading is not noted."""
        tensors: list[FakeTensor] = []

        def one(value: Any) -> Any:
            if type(value) is FakeTensor:
                tensors.append(value)
                return _describe_tensor(value, node_of(value))
            return _describe_plain(value, one)

        return cls((one(args), tuple((k, one(v)) for k, v in kwargs.items())), tuple(tensors))


def _describe_tensor(value: FakeTensor, node: fx.Node) -> Any:
    own = set(vars(value)) - _known_attributes(value)
    if own:
        raise UnequalError(f"a tensor that it is given has an attribute {sorted(own)[0]!r}")
    # Code may tell the call's own tensors from others (`LayoutQuestions`).
    which = id(node) if node.op != "call_function" else 0
    try:
        return "tensor", which, describe(value, value.fake_mode)
    except UnknownError:
        raise UnequalError("a tensor that it is given holds a known number") from None


_attributes: list[frozenset[str]] = []


def _known_attributes(like: FakeTensor) -> frozenset[str]:
    """Return the attributes that PyTorch itself gives to a fake tensor."""
    if not _attributes:
        with torch._C._DisableTorchDispatch():
            raw = torch.empty(0, device="meta")
        _attributes.append(frozenset(vars(FakeTensor(like.fake_mode, raw, torch.device("cpu")))))
    return _attributes[0]


def _describe_plain(value: Any, one: Callable[[Any], Any]) -> Any:
    if type(value) is float:
        return float, value.hex()
    if type(value) in _PLAIN:
        return type(value), value
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return type(value), value.node
    if type(value) is tuple:
        return tuple(map(one, value))
    raise UnequalError(f"it is given a {type(value).__name__}")


def pattern_of(roles: Sequence[fx.Node]) -> tuple[int, ...]:
    """Return which of some nodes are one and the same: the first place of each."""
    return tuple(map(list(roles).index, roles))


def encode(
    nodes: Sequence[fx.Node], roles: Sequence[fx.Node], memories: set[int | None]
) -> tuple[Any, ...]:
    """Describe nodes by what they do, with what: nodes among them, the tensors that the call was
    given or read (`roles`, which lie in `memories`), and sizes.

    Raises UnequalError for what writes to such a tensor, draws random numbers, is no op, or uses a
    tensor that was reached another way.
    """
    places: dict[fx.Node, Any] = {}
    for k, node in enumerate(roles):
        places.setdefault(node, ("role", k))
    for k, node in enumerate(nodes):
        if node in places:
            raise UnequalError("a tensor of it was there before")
        places[node] = ("node", k)

    def one(value: Any) -> Any:
        if isinstance(value, fx.Node):
            if value in places:
                return places[value]
            if isinstance(value.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
                return "size", value
            raise UnequalError(f"its code uses {value.name}, which it was not given")
        if isinstance(value, (list, tuple)):
            return (type(value).__name__, *map(one, value))
        if isinstance(value, dict):
            return ("dict", *((k, one(v)) for k, v in value.items()))
        if isinstance(value, slice):
            return ("slice", one(value.start), one(value.stop), one(value.step))
        return _describe_plain(value, one)

    for node in nodes:
        for written in _written_by(node):
            if memory_of(written.meta["val"]) in memories:
                raise UnequalError(f"its code writes to what it is given, by {node.target}")
    return tuple(_encode(node, one) for node in nodes)


def _written_by(node: fx.Node) -> Iterator[fx.Node]:
    """Give the arguments that an op writes to."""
    if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
        for place, formal in enumerate(node.target._schema.arguments):
            if formal.alias_info is not None and formal.alias_info.is_write:
                given = node.args[place] if place < len(node.args) else node.kwargs.get(formal.name)
                yield from (x for x in pytree.tree_leaves(given) if isinstance(x, fx.Node))


def _encode(node: fx.Node, one: Callable[[Any], Any]) -> Any:
    target: Any = node.target
    if node.op != "call_function":
        raise UnequalError(f"its code makes the constant {node.target}")
    if isinstance(target, OpOverload):
        if draws(target, node.args, node.kwargs):
            raise UnequalError(f"its code draws random numbers, by {target}")
    elif target is not operator.getitem and getattr(target, "__module__", "") not in _FUNCTIONS:
        raise UnequalError(f"its code calls {target}")
    if "unbacked_bindings" in node.meta or "eager_input_vals" in node.meta:
        raise UnequalError(f"its code reads a number from a tensor, by {target}")
    try:
        made = describe(node.meta.get("val"))
    except UnknownError:
        raise UnequalError(f"its {target} gives a constant") from None
    return target, one(node.args), one(node.kwargs), made, node.stack_trace
