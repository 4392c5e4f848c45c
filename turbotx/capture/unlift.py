"""Unlift: turns parameters that an exported program takes as inputs into attributes again.

In: a `torch.export` program and names for its other inputs. Out: an fx graph that reads parameters
by their names in the user's module, and its placeholders in order::

    linear(x, p_model_up_weight, ...)  ->  linear(x, get_attr "up.weight", ...)
"""

from __future__ import annotations

import keyword
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx, nn

from turbotx.capture.light_export import late_code
from turbotx.capture.refusals import made_in_inference_mode
from turbotx.capture.torchao_weights import stand_ins
from turbotx.errors import CaptureError
from turbotx.ir.fx_nodes import fake_mode_of
from turbotx.ir.memory_order import has_version
from turbotx.ir.subgraphs import enclose_graphs

# GraphModule has attributes of its own, such as `graph` and `code`.
RESERVED = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))


def unlift(
    exported: Any, fresh: Collection[str], model: nn.Module, names: list[str]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Return the graph and its inputs, renamed to `names` in order.

    fresh: the constants created by the trace. model: the user's module; what was traced has it, or
    its shadow, as `model`. meta["paths"] says where the user's module has what a get_attr node
    names, meta["quantized"] which of its parameters stand for quantised ones, and how those are.
    """
    enclose_graphs(exported.graph_module)
    graph: fx.Graph = exported.graph_module.graph
    targets = {s.arg.name: s.target for s in exported.graph_signature.input_specs if s.target}
    fresh = exported.constants.keys() & fresh
    holder = nn.Module()
    inputs: list[fx.Node] = []
    paths: dict[str, str] = {}
    owned = {_place(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    known: dict[str, fx.Node] = {}
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        target = targets.get(node.name)
        if target is None:
            _rename(node, names[len(inputs)], {str(n.target) for n in inputs})
            inputs.append(node)
            continue
        value, path = _find(exported, model, target, owned)
        if not has_version(value):  # its changes cannot be detected
            if target not in fresh:
                raise made_in_inference_mode(type(model).__name__, path)
            with torch.inference_mode(False):
                value = value.clone()
        if path in known:  # export lifts a closure's tensor once per use
            node.replace_all_uses_with(known[path])
            graph.erase_node(node)
            continue
        with graph.inserting_before(node):
            if target in fresh and value.dim() == 0 and not value.is_complex():
                # A number that passes and kernels may treat as known.
                made: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
                scalar = torch.ops.aten.scalar_tensor.default
                attribute = graph.call_function(scalar, (value.item(),), made)
            else:
                inside = _path_inside(path, model)
                _assign(holder, inside, value)
                attribute = known[path] = graph.create_node("get_attr", inside)
                paths[inside] = path
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    with late_code():
        graph_module = fx.GraphModule(holder, graph)
    graph_module.meta["paths"] = paths
    graph_module.meta["quantized"] = stand_ins(model)
    return graph_module, inputs


def _rename(node: fx.Node, label: str, taken: set[str]) -> None:
    while label in taken:
        label += "_"
    node.target = label
    if node.name != label:
        node._rename(label)


def _find(
    exported: Any, model: nn.Module, target: str, owned: Mapping[Any, str]
) -> tuple[torch.Tensor, str]:
    """Return the user's own tensor for a lifted name, and its path in the user's module.

    owned: the paths of the module's tensors. Code that reaches the module through a closure or a
    global reads its tensors as constants; they are found by their memory.
    """
    prefix, _, path = target.partition(".")
    owner: Any = model if prefix == "model" else None
    for part in path.split("."):
        owner = getattr(owner, part, None)
    if isinstance(owner, torch.Tensor):
        return owner, path
    made = exported.constants if target in exported.constants else exported.state_dict
    value = _users_own(exported, made[target])
    try:
        known = owned.get(_place(value)) if value.numel() else None
    except RuntimeError as error:  # it has no memory
        raise CaptureError(
            "its code creates a tensor inside of a transform (torch.func.grad, vjp, jacrev), which "
            "a program cannot keep: create it outside of the transformed function"
        ) from error
    return value, known or f"constants.{target.replace('.', '_')}"


def _users_own(exported: Any, constant: torch.Tensor) -> torch.Tensor:
    """Return the tensor that a constant of the program is an alias of: export takes `.data` of a
    parameter that the module does not own (a closure's), which does not reflect later changes.

    The tensor is among those that tracing saw, which PyTorch keeps in a private list (the same from
    2.11 to 2.14); without it, the constant itself is watched.
    """
    seen = fake_mode_of([n.meta.get("val") for n in exported.graph_module.graph.nodes])
    for name in ("fake_tensor_converter", "meta_converter", "describer", "lookup_tensor"):
        seen = getattr(seen, name, None)
    if constant.layout is not torch.strided or not constant.numel():
        return constant
    for tensor in () if seen is None else list(seen):
        if isinstance(tensor, nn.Parameter) and _is_alias(tensor, constant):
            return tensor
    return constant


def _is_alias(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are identical views of the same memory."""
    same = tensor.dtype == other.dtype and tensor.device == other.device
    laid = same and tensor.shape == other.shape and tensor.stride() == other.stride()
    return laid and tensor.data_ptr() == other.data_ptr()


def _place(tensor: torch.Tensor) -> Any:
    """Return a key that is equal for tensors that are identical views of the same memory."""
    held = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
    return held if held[1] else id(tensor)


def _path_inside(path: str, model: nn.Module) -> str:
    """Return a path that a GraphModule has room for: graph.weight becomes graph_.weight, and what
    its code cannot name, a parameter `for`, is for_."""
    owner: Any = model
    found: list[str] = []
    for k, part in enumerate(path.split(".")):
        name = part
        if keyword.iskeyword(part) or (k == 0 and part in RESERVED):
            name += "_"
            while hasattr(owner, name):
                name += "_"
        found.append(name)
        owner = getattr(owner, part, None)
    return ".".join(found)


def _assign(holder: nn.Module, path: str, value: torch.Tensor) -> None:
    *parents, leaf = path.split(".")
    for part in parents:
        if not hasattr(holder, part):
            holder.add_module(part, nn.Module())
        holder = getattr(holder, part)
    if isinstance(value, nn.Parameter):
        holder.register_parameter(leaf, value)
    else:
        holder.register_buffer(leaf, value, persistent=False)


def fresh_constants(exported: Any) -> set[str]:
    """Return the constants created by the trace itself, as for torch.tensor(0.5) in the model's
    code: the user has no name by which to change them later."""
    targets = {s.arg.name: s.target for s in exported.graph_signature.input_specs if s.target}
    lift = torch.ops.aten.lift_fresh_copy.default
    nodes = [n for n in exported.graph_module.graph.nodes if n.name in targets]
    return {targets[n.name] for n in nodes if all(u.target is lift for u in n.users)}
