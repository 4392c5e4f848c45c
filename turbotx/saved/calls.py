"""Calls: ATen calls as JSON: what a launch runs in PyTorch, and how constants are prepared.

In: an op or a graph of ops. Out: names and arguments, and the same calls again as an fx graph; ops
are looked up in PyTorch by name, and nothing else is::

    {"target": "aten.cat.default", "args": [[{"node": "a"}, {"node": "b"}], 0], "kwargs": {}}
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from turbotx.errors import SavedFileError, SaveError
from turbotx.ir.attention_ops import attention, attention_scores, attention_values
from turbotx.program.folded_weights import (
    fold_scales,
    fold_shift,
    fold_sums,
    fold_weight,
    join_affine,
)
from turbotx.saved.values import decode_constant, encode_constant

# The functions that stand in graphs and are none of PyTorch's ops.
OWN: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem, "attention": attention,
    "attention_scores": attention_scores, "attention_values": attention_values,
    "fold_weight": fold_weight, "fold_scales": fold_scales, "fold_sums": fold_sums,
    "fold_shift": fold_shift, "join_affine": join_affine,
}  # fmt: skip


def encode_target(target: Any) -> str:
    """Return an op's name; raise SaveError for a function that is none of PyTorch's ops."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    for name, known in OWN.items():
        if target is known:
            return name
    raise SaveError(f"{target} cannot be saved: it is no op that PyTorch finds by name")


def decode_target(name: str) -> Callable[..., Any]:
    """Return the op of a name; raise SavedFileError where this PyTorch has none."""
    if name in OWN:
        return OWN[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except (AttributeError, RuntimeError) as error:
        raise SavedFileError(f"torch {torch.__version__} has no op {name}") from error
    if not isinstance(found, torch._ops.OpOverload):
        raise SavedFileError(f"{name} is no op of PyTorch")
    return found


def encode_arguments(value: Any, special: Callable[[Any], Any]) -> Any:
    """Return arguments as JSON; `special` gives what is no constant as a dict, or None."""
    found = special(value)
    if found is not None:
        return found
    if isinstance(value, (list, tuple)):
        return [encode_arguments(v, special) for v in value]
    if isinstance(value, Mapping):
        return {"map": {k: encode_arguments(v, special) for k, v in value.items()}}
    return encode_constant(value)


def decode_arguments(value: Any, special: Mapping[str, Callable[[Any], Any]]) -> Any:
    """Return arguments from JSON; `special` reads the dicts that are no constants, by their key."""
    if isinstance(value, list):
        return [decode_arguments(v, special) for v in value]
    if isinstance(value, dict):
        ((kind, inner),) = value.items()
        if kind == "map":
            return {k: decode_arguments(v, special) for k, v in inner.items()}
        if kind in special:
            return special[kind](inner)
    return decode_constant(value)


def encode_nodes(nodes: Iterable[fx.Node]) -> list[dict[str, Any]]:
    """Return calls and everything they need, each before its first reader."""
    done: dict[fx.Node, dict[str, Any]] = {}

    def reference(value: Any) -> Any:
        return {"node": value.name} if isinstance(value, fx.Node) else None

    def visit(node: fx.Node) -> None:
        if node in done:
            return
        for source in node.all_input_nodes:
            visit(source)
        entry: dict[str, Any] = {"name": node.name}
        if node.op == "call_function":
            entry["target"] = encode_target(node.target)
            entry["args"] = encode_arguments(list(node.args), reference)
            entry["kwargs"] = encode_arguments(dict(node.kwargs), reference)
        elif node.op not in ("get_attr", "placeholder"):
            raise SaveError(f"{node.format_node()} cannot be saved")
        done[node] = entry

    for node in nodes:
        visit(node)
    # Folded norms' constants have copies of the parameters' own calls.
    unique: dict[str, dict[str, Any]] = {}
    for entry in done.values():
        if unique.setdefault(entry["name"], entry) != entry:
            raise SaveError(f"two constants are called {entry['name']}; please report it")
    return list(unique.values())


def decode_nodes(entries: Iterable[Mapping[str, Any]], place: torch.device) -> dict[str, fx.Node]:
    """Return the calls as nodes of one fx graph, by name; what they are given as placeholders.

    place: where they run now, whatever device they name.
    """
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    special: dict[str, Callable[[Any], Any]] = {
        "node": lambda name: made[name], "device": lambda name: place,
    }  # fmt: skip
    for entry in entries:
        name = entry["name"]
        if "target" in entry:
            args = tuple(decode_arguments(entry["args"], special))
            kwargs = decode_arguments(entry["kwargs"], special)
            target = decode_target(entry["target"])
            made[name] = graph.create_node("call_function", target, args, kwargs, name=name)
        else:
            made[name] = graph.create_node("placeholder", name, name=name)
    return made
