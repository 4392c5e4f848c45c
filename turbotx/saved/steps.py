"""Steps: the launches of a saved program that PyTorch runs, between the native ones.

In: a launch's call as JSON. Out: a function that runs it on one run's tensors and memory::

    call = {"target": "aten.cumsum.default", "args": [{"window": {...}}, 1], ...}
    step = make_step(call, dims, torch.device("cpu"))
    step(state)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn

from turbotx.runtime.aten_call import call_into
from turbotx.runtime.executable import make_size
from turbotx.runtime.state import Maker, RunState, Step, make_alias, make_window
from turbotx.saved.calls import decode_arguments, decode_nodes, decode_target
from turbotx.saved.values import compile_texts, decode_constant


def window_of(window: Mapping[str, Any], dims: Sequence[str]) -> Callable[[RunState], torch.Tensor]:
    """Return a function that gives the tensor a window stands for in one run."""
    return make_window(
        window["tensor"],
        decode_constant(window["dtype"]),
        compile_texts(window["shape"], dims),
        compile_texts(window["strides"], dims),
        compile_texts([window["offset"]], dims),
    )


def make_step(call: Mapping[str, Any], dims: Sequence[str], place: torch.device) -> Step:
    """Return a function that runs one launch by PyTorch and puts its results where they belong.

    place: where it runs, whatever device the call names.
    """
    special: dict[str, Callable[[Any], Any]] = {
        "window": lambda window: _Made(window_of(window, dims)),
        "device": lambda name: place,
        "size": lambda text: _Made(make_size(compile_texts([text], dims))),
    }
    args = decode_arguments(call["args"], special)
    kwargs = decode_arguments(call["kwargs"], special)
    writes = [None if w is None else window_of(w, dims) for w in call["writes"]]
    target = (
        _make_module(call["graph"], place) if "graph" in call else decode_target(call["target"])
    )

    def step(state: RunState) -> None:
        given, options = _fill(args, state), _fill(kwargs, state)
        windows = [None if w is None else w(state) for w in writes]
        call_into(target, given, options, windows, call["has_out"])

    return step


def alias_of(leaf: Mapping[str, Any], dims: Sequence[str]) -> Callable[[RunState], torch.Tensor]:
    """Return a function that gives a leaf that is an input, a parameter or a view of one."""
    special = {"size": lambda text: _Made(make_size(compile_texts([text], dims)))}

    def filled(structure: Any) -> Maker:
        decoded = decode_arguments(structure, special)
        return lambda state: _fill(decoded, state)

    steps = [
        (decode_target(s["target"]), filled(s["args"]), filled(s["kwargs"])) for s in leaf["steps"]
    ]
    return make_alias(leaf["alias"], steps)


@dataclass(frozen=True)
class _Made:
    """An argument that is made anew in each run."""

    make: Maker


def _fill(structure: Any, state: RunState) -> Any:
    if isinstance(structure, _Made):
        return structure.make(state)
    if isinstance(structure, list):
        return [_fill(v, state) for v in structure]
    if isinstance(structure, dict):
        return {k: _fill(v, state) for k, v in structure.items()}
    return structure


def _make_module(described: Mapping[str, Any], place: torch.device) -> fx.GraphModule:
    nodes = decode_nodes(described["nodes"], place)
    graph = next(iter(nodes.values())).graph
    graph.output(tuple(nodes[name] for name in described["outputs"]))
    order = [nodes[name] for name in described["inputs"]]
    for before, node in pairwise(order):
        before.append(node)
    return fx.GraphModule(nn.Module(), graph)
