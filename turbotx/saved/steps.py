"""Steps: the launches of a saved program that PyTorch runs, between the native ones.

In: a launch's call as JSON. Out: a function that runs it on one run's tensors and memory::

    step = make_step({"target": "aten.cumsum.default", "args": [{"window": {...}}, 1], ...}, dims)
    step(run)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn

from turbotx.runtime.outside import call_into
from turbotx.saved.calls import decode_arguments, decode_nodes, decode_target
from turbotx.saved.values import compile_texts, decode_constant


@dataclass(frozen=True)
class Run:
    """What one run works on: the shape, planned memory, and inputs, outputs and weights by name."""

    dims: tuple[int, ...]
    offsets: Mapping[str, int]
    arena: torch.Tensor
    named: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor]

    def tensor(self, name: str) -> torch.Tensor:
        """Return an input, an output or a weight."""
        found = self.named.get(name)
        return self.weights[name] if found is None else found


Step = Callable[[Run], None]


def make_window(window: Mapping[str, Any], dims: Sequence[str]) -> Callable[[Run], torch.Tensor]:
    """Return a function that gives the tensor a window stands for in one run."""
    shape, strides = compile_texts(window["shape"], dims), compile_texts(window["strides"], dims)
    offset = compile_texts([window["offset"]], dims)
    name, dtype = window["tensor"], decode_constant(window["dtype"])

    def whole(run: Run) -> torch.Tensor:
        if not window["planned"]:
            return run.tensor(name)
        begin = run.offsets[name]
        count = (run.arena.numel() - begin) // dtype.itemsize
        return run.arena[begin : begin + count * dtype.itemsize].view(dtype)

    def look(run: Run) -> torch.Tensor:
        base = whole(run)
        start = base.storage_offset() + offset(*run.dims)[0]
        return base.as_strided(shape(*run.dims), strides(*run.dims), start)

    return look


def make_step(call: Mapping[str, Any], dims: Sequence[str]) -> Step:
    """Return a function that runs one launch by PyTorch and puts its results where they belong."""
    special: dict[str, Callable[[Any], Any]] = {
        "window": lambda window: _Made(make_window(window, dims)),
        "size": lambda text: _Made(_make_size(text, dims)),
    }
    args = decode_arguments(call["args"], special)
    kwargs = decode_arguments(call["kwargs"], special)
    writes = [None if w is None else make_window(w, dims) for w in call["writes"]]
    target = _make_module(call["graph"]) if "graph" in call else decode_target(call["target"])

    def step(run: Run) -> None:
        given, options = _fill(args, run), _fill(kwargs, run)
        windows = [None if w is None else w(run) for w in writes]
        call_into(target, given, options, windows, call["has_out"])

    return step


@dataclass(frozen=True)
class _Made:
    """An argument that is made anew in each run."""

    make: Callable[[Run], Any]


def _make_size(text: str, dims: Sequence[str]) -> Callable[[Run], int]:
    evaluate = compile_texts([text], dims)
    return lambda run: int(evaluate(*run.dims)[0])


def _fill(structure: Any, run: Run) -> Any:
    if isinstance(structure, _Made):
        return structure.make(run)
    if isinstance(structure, list):
        return [_fill(v, run) for v in structure]
    if isinstance(structure, dict):
        return {k: _fill(v, run) for k, v in structure.items()}
    return structure


def _make_module(described: Mapping[str, Any]) -> fx.GraphModule:
    nodes = decode_nodes(described["nodes"])
    graph = next(iter(nodes.values())).graph
    graph.output(tuple(nodes[name] for name in described["outputs"]))
    order = [nodes[name] for name in described["inputs"]]
    for before, node in pairwise(order):
        before.append(node)
    return fx.GraphModule(nn.Module(), graph)
