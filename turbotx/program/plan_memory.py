"""Plan memory: who lives when in a program, and the planner that gives every buffer its place.

In: an assembly and the name of a planner. Out: lifetimes, size classes as formulas, and a planner
that is tuned to the shapes to expect and right at all others::

    plan_memory(assembly, ("batch", "seq"), "symbolic").at((1, 40)).peak_nbytes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from turbotx.ir.expr import Expr, compile_evaluator, to_python
from turbotx.memory.liveness import LaunchUse, Liveness, analyze
from turbotx.memory.planner import Plan, make_planner
from turbotx.memory.planner.plan import Planner
from turbotx.program.assembly import Assembly

EXPECTED = ((1, 16), (1, 128), (4, 64), (8, 128), (16, 512), (1, 512))
"""Batch and length of the shapes that a planner is tuned to."""


@dataclass(frozen=True)
class PlannedMemory:
    """A program's intermediates at any shape.

    size_classes: of every root buffer, in the order of `liveness.names`. class_nbytes: the bytes of
    each class, of the dims. planner_kind: the option.
    """

    liveness: Liveness
    size_classes: Sequence[int]
    class_nbytes: Callable[..., tuple[int, ...]]
    planner: Planner
    planner_kind: str

    def at(self, dims: Sequence[int]) -> Plan:
        """Return the full plan at these dims."""
        return self.planner.plan(self.class_nbytes(*dims))

    def sizes_at(self, dims: Sequence[int]) -> dict[str, int]:
        """Return the bytes of every buffer at these dims."""
        sizes = self.class_nbytes(*dims)
        return dict(zip(self.liveness.names, (sizes[c] for c in self.size_classes), strict=True))


def plan_memory(assembly: Assembly, dims: Sequence[str], planner: str) -> PlannedMemory:
    """Return the lifetimes of an assembly's intermediates and a planner of a kind for them."""
    tensors = assembly.tensors
    outside = [n for n, t in tensors.items() if t.kind != "intermediate"]
    uses = [
        LaunchUse(x.name, x.reads, x.writes, x.workspaces, x.inplace) for x in assembly.launches
    ]
    sizes = {n: to_python(t.nbytes) for n, t in tensors.items()}
    found = analyze(uses, outside=outside, size_of=sizes)
    classes: dict[Expr, int] = {}
    of = [classes.setdefault(tensors[n].nbytes, len(classes)) for n in found.names]
    class_nbytes = compile_evaluator(list(classes), tuple(dims))
    seed, samples = _expected_sizes(class_nbytes, max(of, default=-1) + 1, dims)
    made = make_planner(planner, found.lifetimes, of, found.names, seed, samples)
    return PlannedMemory(found, of, class_nbytes, made, planner)


def _expected_sizes(
    class_nbytes: Callable[..., tuple[int, ...]], count: int, dims: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Return the bytes of `count` classes at one shape to expect, and at all of them."""
    rows = []
    for batch, seq in EXPECTED:
        shape = [batch if k == 0 or "_d0" in n else seq for k, n in enumerate(dims)]
        try:
            rows.append([max(1, x) for x in class_nbytes(*shape)])
        except (ArithmeticError, ValueError):  # no size that this model takes: it divides by zero
            continue
    if not rows:  # sizes that are as good as any
        rows = [[1 << (k % 8 + 8) for k in range(count)]]
    return rows[min(3, len(rows) - 1)], rows
