"""Origin: the model as captured, before any pass, and the memory that PyTorch would use to run it.

In: a `Captured` before any pass. Out: one `Node` per call with its inputs, its place in the user's
source and the bytes of its result::

    simulate(origin, {"batch": 4, "seq": 128})  ->  EagerMemory(peak_nbytes=6291456, ...)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from turbotx.capture.trace import Captured
from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import ZERO, Expr, compile_evaluator, product
from turbotx.passes.partition import op_name
from turbotx.report.entries import EagerMemory

ROUND_NBYTES = 512
"""PyTorch's CUDA allocator rounds to multiples of this; its CPU one to 64, which is close
enough."""

SHARING = frozenset({"_unsafe_view", "alias", "detach", "dropout", "feature_dropout", "lift_fresh"})
"""Ops whose schema does not say so, but whose result aliases their input in eager inference."""

METHOD = (
    "every op of the captured model in order; its result lives from the op to its last reader, "
    f"views share what they show, sizes are rounded up to {ROUND_NBYTES} bytes. Inputs, "
    "parameters and the model's outputs are left out, as they are from the plan; so are the "
    "ops' own workspaces and whatever the model's Python code keeps longer than it needs. "
    "Of the caching allocator: the same stream of allocations where it takes "
    "2 MiB segments for sizes up to 1 MiB and 20 MiB segments up to 10 MiB, best fit, split, merge."
)


@dataclass(frozen=True)
class Node:
    """One call of the captured graph. root: the node that owns the result's memory, usually
    itself."""

    name: str
    op: str
    kind: str
    target: str
    inputs: tuple[str, ...]
    root: str
    nbytes: Expr
    module: str
    place: str

    @property
    def makes_memory(self) -> bool:
        """Whether PyTorch launches something for it and allocates its result."""
        return self.kind == "call_function" and self.root == self.name and self.nbytes != 0


@dataclass(frozen=True)
class Origin:
    """The captured graph's nodes in order, and the names of those whose memory the caller keeps."""

    nodes: tuple[Node, ...]
    kept: frozenset[str]
    dims: tuple[str, ...]


def observe(captured: Captured) -> Origin:
    """Record a captured graph. To be called before the passes, which rewrite it in place."""
    roots: dict[fx.Node, str] = {}
    nodes = []
    for node in captured.graph_module.graph.nodes:
        shared = _shares(node)
        roots[node] = node.name if shared is None else roots[shared]
        nodes.append(
            Node(
                node.name,
                op_name(node) if node.op == "call_function" else node.op,
                node.op,
                str(node.target),
                tuple(n.name for n in node.all_input_nodes),
                roots[node],
                _nbytes(node),
                g.module_of(node),
                g.place_of(node),
            )
        )
    output = next(n for n in captured.graph_module.graph.nodes if n.op == "output")
    kept = frozenset(roots[n] for n in output.all_input_nodes)
    return Origin(tuple(nodes), kept, captured.dims)


def _shares(node: fx.Node) -> fx.Node | None:
    """Return the argument that a node's result aliases, or None."""
    if node.op != "call_function":
        return None
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    is_piece = node.target is g.GETITEM
    shares = g.is_view(source) if is_piece else g.is_view(node) or op_name(node) in SHARING
    return source if shares else None


def _nbytes(node: fx.Node) -> Expr:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    total = ZERO
    for v in values:
        if isinstance(v, torch.Tensor):
            total = total + product([g.size(s) for s in v.shape]) * v.dtype.itemsize
    return total


def find_lives(origin: Origin) -> dict[str, tuple[int, int]]:
    """Return the first and last node, by index, during which each intermediate is alive."""
    last = {n.root: k for k, n in enumerate(origin.nodes)}
    root = {n.name: n.root for n in origin.nodes}
    for k, node in enumerate(origin.nodes):
        for name in node.inputs:
            last[root[name]] = k
    return {
        node.name: (k, last[node.name])
        for k, node in enumerate(origin.nodes)
        if node.makes_memory and node.name not in origin.kept
    }


def simulate(origin: Origin, dims: Mapping[str, int]) -> EagerMemory:
    """Return PyTorch's memory use at these dims; METHOD says what is counted."""
    evaluate = compile_evaluator([n.nbytes for n in origin.nodes], origin.dims)
    sizes = evaluate(*(dims[name] for name in origin.dims))
    nbytes = {n.name: _round(size) for n, size in zip(origin.nodes, sizes, strict=True)}
    alive = find_lives(origin)
    events: list[tuple[str, int]] = []  # (name, bytes), negative for a free
    dying: dict[int, list[str]] = {}
    for k, node in enumerate(origin.nodes):
        if node.name in alive and nbytes[node.name]:
            events.append((node.name, nbytes[node.name]))
            dying.setdefault(alive[node.name][1], []).append(node.name)
        events += [(name, -nbytes[name]) for name in dying.pop(k, ())]
    live = peak = 0
    for _, change in events:
        live += change
        peak = max(peak, live)
    allocations = sum(change > 0 for _, change in events)
    return EagerMemory(peak, reserve(events), allocations, METHOD)


def _round(nbytes: int) -> int:
    return -(-nbytes // ROUND_NBYTES) * ROUND_NBYTES


def reserve(events: Sequence[tuple[str, int]]) -> int:
    """Return the total bytes of segments that a caching allocator reserves for a series of events.

    Best fit over free blocks of the right pool, split on allocation, merged with free neighbours:
    the scheme and constants of PyTorch's CUDA allocator (c10/cuda/CUDACachingAllocator.cpp),
    without its options.
    """
    mib = 2**20
    free: dict[str, list[list[int]]] = {"small": [], "large": []}  # [segment, begin, end]
    held: dict[str, tuple[str, list[int]]] = {}
    total = segments = 0
    for name, change in events:
        if change < 0:
            pool, block = held.pop(name)
            _merge(free[pool], block)
            continue
        pool = "small" if change <= mib else "large"
        fitting = [b for b in free[pool] if b[2] - b[1] >= change]
        if fitting:
            block = min(fitting, key=lambda b: b[2] - b[1])
            free[pool].remove(block)
        else:
            large = 20 * mib if change < 10 * mib else -(-change // (2 * mib)) * 2 * mib
            size = 2 * mib if pool == "small" else large
            total, segments = total + size, segments + 1
            block = [segments, 0, size]
        rest = block[2] - block[1] - change
        if rest >= (ROUND_NBYTES if pool == "small" else mib + 1):
            free[pool].append([block[0], block[1] + change, block[2]])
            block = [block[0], block[1], block[1] + change]
        held[name] = (pool, block)
    return total


def _merge(free: list[list[int]], block: list[int]) -> None:
    for other in list(free):
        if other[0] == block[0] and (other[2] == block[1] or other[1] == block[2]):
            free.remove(other)
            block = [block[0], min(block[1], other[1]), max(block[2], other[2])]
    free.append(block)
