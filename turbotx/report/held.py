"""Held: the memory that a program uses: its plan, its weights, and what is derived from them.

In: a compiled call at one shape. Out: the `Memory` entry of a report, for example::

    describe_plan(view, "symbolic", held)  ->  Memory(peak_nbytes=4718592, weights_nbytes=..., ...)
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from turbotx.capture.torchao_weights import is_torchao
from turbotx.ir.printer import show_expr
from turbotx.memory.planner import Plan
from turbotx.report import entries
from turbotx.report.describe import View
from turbotx.runtime.packed_parameter import PackedParameter


def describe_plan(view: View, planner: str, pytorch: entries.EagerMemory) -> entries.Memory:
    """Return the plan at the view's shape, with PyTorch's memory for comparison and the weights."""
    program = view.compiled.program
    plan = program.plan(list(view.dims.values()))
    tensors = view.compiled.assembly.tensors
    sharing: dict[str, list[str]] = {}
    for name, root in program.liveness.root_of.items():
        sharing.setdefault(root, []).append(name)
    buffers = tuple(
        entries.Placed(
            p.buffer.name,
            p.buffer.nbytes,
            show_expr(tensors[p.buffer.name].nbytes),
            (p.buffer.lifetime.begin, p.buffer.lifetime.end),
            p.offset,
            tuple(sharing[p.buffer.name]),
        )
        for p in plan.placements
    )
    chunks = tuple((c.offset, c.nbytes) for c in plan.chunks)
    weights, derived, packed = _weights(view)
    return entries.Memory(
        planner, plan.peak_nbytes, plan.lower_bound_nbytes, _scratch(view, plan), chunks, buffers,
        pytorch, weights, derived, packed,
    )  # fmt: skip


def _scratch(view: View, plan: Plan) -> int:
    """Return how much of the lower bound is workspaces, at the launch with the most live bytes."""
    names = {name for x in view.launches for name in x.workspaces}
    begins = {p.buffer.lifetime.begin for p in plan.placements}
    alive = [
        [p.buffer for p in plan.placements if p.buffer.lifetime.begin <= at < p.buffer.lifetime.end]
        for at in begins
    ]
    fullest = max(alive, key=lambda buffers: sum(b.nbytes for b in buffers), default=[])
    return sum(b.nbytes for b in fullest if b.name in names)


def _weights(view: View) -> tuple[int, int, int]:
    """Return the bytes of the model's own weights, of constants derived from them, and of packed
    weights."""
    program, tensors = view.compiled.program, view.compiled.assembly.tensors
    weights = program.runtime.weights
    held: list[Any] = [t for _, t in weights.owned() if not isinstance(t, PackedParameter)]
    plain: list[torch.Tensor] = [t.qdata if is_torchao(t) else t for t in held]
    own = {t.data_ptr(): t.nbytes for t in plain}
    derived = sum(_nbytes(n) for name, n in weights.hoisted.items() if name in weights.read)
    cpu = program.executable.cpu
    packed = sum(
        prod(w.shape) * tensors[w.tensor].dtype.itemsize
        for p in (cpu.packings if cpu is not None else ())
        for w in p.parts
    )
    return sum(own.values()), derived, packed


def _nbytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.dtype.itemsize if isinstance(value, torch.Tensor) else 0
