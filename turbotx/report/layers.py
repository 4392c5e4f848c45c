"""Layers: which repeated part of the model a buffer belongs to; and the plan, for drawing both.

In: a report. Out: a function from a buffer's name to its layer, for colours and groups; the plan of
a report's memory::

    find_layers(report)("linear_7")  ->  "encoder.layer.2"
"""

from __future__ import annotations

from collections.abc import Callable

from turbotx.memory.planner import Buffer, Chunk, Lifetime, Placement, Plan
from turbotx.report.amounts import layer_of
from turbotx.report.entries import Memory
from turbotx.report.record import Record


def find_layers(report: Record) -> Callable[[str], str]:
    """Return a function from a buffer's name to the layer of the launch that writes it."""
    module = {w: x.module for x in report.launches for w in x.writes}
    return lambda buffer: layer_of(module.get(buffer, ""))


def plan_of(memory: Memory) -> Plan:
    """Return the plan of a memory entry."""
    placements = tuple(
        Placement(Buffer(b.name, b.nbytes, Lifetime(*b.lifetime)), b.offset) for b in memory.buffers
    )
    chunks = tuple(Chunk(*c) for c in memory.chunks)
    return Plan(chunks, placements, memory.peak_nbytes, memory.lower_bound_nbytes)
