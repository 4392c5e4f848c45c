"""Copying: the nodes of a layer's call made once more, for the call of an equal layer.

In: a traced call (`KnownLayer`) and the tensors of another. Out: its nodes in the tracer's graph,
as a trace of the layer's code would have made them, and what the code would have returned::

    copy_layer(traced, tracer, roles, "encoder.layer.7", leaves)  ->  (hidden_states,)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    extract_val,
    track_tensor,
)

from turbotx.capture.equal_layers.layer_state import UnequalError
from turbotx.ir.memory_order import memory_of


@dataclass(frozen=True)
class Returned:
    """A tensor that a layer returns: the node-th that it made, or (no node) the given-th of its
    arguments' tensors."""

    node: int | None
    given: int | None = None


@dataclass(frozen=True)
class LayerScope:
    """Where a tracer is: the modules that it is in, outermost first, the last one the layer's, and
    how often it has called those inside of the layer."""

    stack: tuple[tuple[str, Any], ...]
    path: str
    calls: dict[str, int]

    @classmethod
    def of(cls, tracer: Any) -> LayerScope:
        """Return where a tracer is; it has just entered a layer."""
        stack = tuple((k, (path, _name(kind))) for k, (path, kind) in tracer.module_stack.items())
        path = stack[-1][1][0]
        return cls(stack, path, inner_calls(tracer, path))


def inner_calls(tracer: Any, path: str) -> dict[str, int]:
    """Return how often the modules inside of a layer were called, by what follows its path."""
    begin = len(path)
    inside = f"{path}."
    return {p[begin:]: n for p, n in tracer.num_calls.items() if p.startswith(inside)}


def _name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else kind


def note_output(
    output: Any, nodes: Sequence[fx.Node], node_of: Any, given: Sequence[torch.Tensor]
) -> Any:
    """Return a layer's output with `Returned` for its tensors. Raises UnequalError for what is no
    tensor, number or tuple of these, or shows a part of something that lives elsewhere."""
    places = {node: k for k, node in enumerate(nodes)}
    memories = {memory_of(t) for t in given}
    seen: dict[int | None, fx.Node] = {}

    def one(value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(map(one, value))
        if value is None or type(value) in (bool, int, float, str):
            return value
        for k, tensor in enumerate(given):
            if value is tensor:
                return Returned(None, k)
        if type(value) is not FakeTensor:
            raise UnequalError(f"it returns a {type(value).__name__}")
        node, memory = node_of(value), memory_of(value)
        if node not in places or value.storage_offset() != 0 or memory in memories:
            raise UnequalError("it returns a part of a tensor")
        if seen.setdefault(memory, node) is not node:
            raise UnequalError("it returns two views of one tensor")
        return Returned(places[node])

    return one(output)


def copy_nodes(
    nodes: Sequence[fx.Node],
    tracer: Any,
    known: dict[fx.Node, fx.Node],
    then: LayerScope,
    now: LayerScope,
) -> list[fx.Node]:
    """Append nodes once more, over the tensors that `known` has for those of then."""
    graph, made = tracer.graph, []
    for node in nodes:
        args, kwargs = (
            fx.node.map_arg(x, lambda n: known.get(n, n)) for x in (node.args, node.kwargs)
        )
        target: Any = node.target
        packet = target.overloadpacket if isinstance(target, OpOverload) else None
        name = None if packet is None else graph._target_to_str(packet.__name__)
        new = graph.create_node("call_function", target, args, kwargs, name, node.type)
        new.meta = dict(node.meta)
        new.meta["nn_module_stack"] = _move(node.meta.get("nn_module_stack") or {}, then, now)
        if "val" in node.meta:
            new.meta["val"] = extract_val(node.meta["val"])
        known[node] = new
        made.append(new)
    return made


def _move(stack: dict[str, Any], then: LayerScope, now: LayerScope) -> dict[str, Any]:
    """Return a node's modules for another layer: those around it as they are now, those inside by
    their paths in it and how often they were called before."""
    moved = dict(now.stack)
    for key, (path, kind) in list(stack.items())[len(then.stack) :]:
        inner = path[len(then.path) :]
        count = int(key[len(path) + 1 :] or 0) - then.calls.get(inner, 0) + now.calls.get(inner, 0)
        path = f"{now.path}{inner}"
        moved[f"{path}@{count}" if count else path] = (path, kind)
    return moved


def is_inside(node: fx.Node, scope: LayerScope) -> bool:
    """Return whether the modules that a node was made in are inside of the layer."""
    inner = list((node.meta.get("nn_module_stack") or {}).values())[len(scope.stack) :]
    return all(path.startswith(f"{scope.path}.") for path, _ in inner)


def make_output(
    output: Any, nodes: Sequence[fx.Node], tracer: Any, given: Sequence[torch.Tensor]
) -> Any:
    """Return what `note_output` has noted, with tensors of these nodes."""
    made: dict[int, FakeTensor] = {}

    def one(value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(map(one, value))
        if not isinstance(value, Returned):
            return value
        if value.node is None:
            assert value.given is not None
            return given[value.given]
        if value.node not in made:
            made[value.node] = _new_tensor(nodes[value.node], tracer)
        return made[value.node]

    return one(output)


def _new_tensor(node: fx.Node, tracer: Any) -> FakeTensor:
    """Return a tensor that stands for a node's result in the code under the trace, in memory of its
    own."""
    like: FakeTensor = node.meta["val"]
    mode = like.fake_mode
    with torch._C.DisableTorchFunction(), disable_proxy_modes_tracing():
        shape, strides = like.shape, like.stride()
        with in_kernel_invocation_manager(mode):
            raw = torch.empty_strided(shape, strides, dtype=like.dtype, device="meta")
        tensor = FakeTensor(mode, raw, like.device)
    bind(tensor, node, tracer)
    return tensor


def bind(tensor: torch.Tensor, node: fx.Node, tracer: Any) -> None:
    """Make a node the tracer's node of a tensor: later ops on the tensor read that node."""
    with torch._C.DisableTorchFunction(), disable_proxy_modes_tracing():
        track_tensor(tensor, fx.Proxy(node, tracer), constant=None, tracer=tracer)
