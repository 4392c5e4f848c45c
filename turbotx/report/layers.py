"""Layers: which repeated part of the model a buffer belongs to; and the plan, for drawing both.

In: a report. Out: a function from a buffer's name to its layer, for colours and groups; the plan
behind a report's memory::

    find_layers(report)("linear_7")  ->  "encoder.layer.2"
"""

from __future__ import annotations

from collections.abc import Callable

from turbotx.memory.planner import Buffer, Chunk, Lifetime, Placement, Plan
from turbotx.report.entries import Memory
from turbotx.report.record import Record


def find_layers(report: Record) -> Callable[[str], str]:
    """Return a function from a buffer's name to the layer whose launch writes it."""
    module = {w: x.module for x in report.launches for w in x.writes}
    return lambda buffer: layer_of(module.get(buffer, ""))


def layer_of(module: str) -> str:
    """Return a module's path up to its first number, or its first part."""
    parts = module.split(".")
    ends = [k for k, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: ends[0] + 1]) if ends else (parts[0] or "model")


def plan_of(memory: Memory) -> Plan:
    """Return the plan behind a memory entry."""
    placements = tuple(
        Placement(Buffer(b.name, b.nbytes, Lifetime(*b.lifetime)), b.offset) for b in memory.buffers
    )
    chunks = tuple(Chunk(*c) for c in memory.chunks)
    return Plan(chunks, placements, memory.peak_nbytes, memory.lower_bound_nbytes)
