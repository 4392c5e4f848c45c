"""Sweeps: assigns statements to the column loops of a row.

In: a kernel with plain reductions. Out: the sweep of each value, by the reductions it depends on; a
softmax over columns takes three::

    sweep 0: largest = max(x)     sweep 1: total = sum(exp(x - largest))     sweep 2: the store
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from turbotx import ir
from turbotx.ir.primitives import PRIMITIVES


class Sweeps:
    """A kernel's statements by sweep. phase: number of reductions in sequence before a value."""

    def __init__(self, kernel: ir.Kernel) -> None:
        self.kernel = kernel
        self.varies = kernel.varies_over()
        self.columns = frozenset(a.name for a in kernel.columns)
        self.makers = {r: s for s in kernel.body for r in ir.results_of(s)}
        self.phase = kernel.phases()
        ends = (self.of(s) for s in kernel.body if self.in_column(s))
        self.count = 1 + max(ends, default=0)

    def of(self, s: ir.Statement) -> int:
        """Return the first sweep at whose start a statement's operands are available."""
        return ir.phase_of(s, self.phase)

    def in_column(self, s: ir.Statement) -> bool:
        """Return whether a statement is inside the column loop."""
        return isinstance(s, ir.Reduce) or bool(self.columns & ir.axes_along(s, self.varies))

    def reduces(self, sweep: int) -> list[ir.Reduce]:
        """Return the reductions of a sweep."""
        return [s for s in self.kernel.body if isinstance(s, ir.Reduce) and self.of(s) == sweep]

    def stores(self, sweep: int) -> list[ir.Store]:
        """Return the stores inside the column loop of a sweep."""
        return [
            s for s in self.kernel.body
            if isinstance(s, ir.Store) and self.in_column(s) and self.of(s) == sweep
        ]  # fmt: skip

    def row_statements(self, sweep: int) -> list[ir.Statement]:
        """Return the statements that are constant in a row and available before a sweep, in
        order."""
        return [s for s in self.kernel.body if not self.in_column(s) and self.of(s) == sweep]

    def scans(self, values: Iterable[str]) -> list[ir.Scan]:
        """Return the scans among the values of a column loop."""
        return [s for v in values if isinstance(s := self.makers[v], ir.Scan)]

    def ends(self, sweep: int) -> list[str]:
        """Return the values that a column loop must compute: arguments of reductions, stored
        values."""
        wanted: list[ir.Statement] = [*self.reduces(sweep), *self.stores(sweep)]
        return [v for s in wanted for v in ir.needs_of(s)]

    def closure(self, ends: Iterable[str], known: Mapping[str, int] = {}) -> list[str]:
        """Return the column values needed for `ends`, in order; known ones end the search."""
        found: dict[str, None] = {}

        def visit(v: str) -> None:
            if v in found or not self.varies[v] & self.columns:
                return
            if v not in known:
                for a in ir.needs_of(self.makers[v]):
                    visit(a)
                for check in self.kernel.body:
                    if isinstance(check, ir.Check) and check.value == v and check.mask:
                        visit(check.mask)
            found[v] = None

        for v in ends:
            visit(v)
        return list(found)

    def kept(self) -> dict[str, int]:
        """Return the values to keep in scratch between column loops, with the sweep of each."""
        first: dict[str, int] = {}
        again: set[str] = set()
        for sweep in range(self.count if self.columns else 0):
            needed = self.closure(self.ends(sweep), first)
            again.update(v for v in needed if v in first)
            for v in needed:
                first.setdefault(v, sweep)
        kept: dict[str, int] = {}
        for v in [v for v in self.makers if v in again]:
            made = self.closure([v], kept)
            if sum(1 if m in kept else cost_of(self.makers[m]) for m in made) > 3:
                kept[v] = first[v]
        inner = {a for v in kept for a in self.closure([v]) if a != v}
        outside = {
            a for s in self.kernel.body
            if isinstance(s, (ir.Compute, ir.Reduce, ir.Scan, ir.Store))
            and not set(ir.results_of(s)) & set(kept)
            for a in ir.needs_of(s)
        }  # fmt: skip
        return {v: k for v, k in kept.items() if v not in inner or v in outside}


def cost_of(s: ir.Statement) -> int:
    """Return the cost of a statement, in adds."""
    if isinstance(s, ir.Compute):
        return PRIMITIVES[s.op].cost
    return 1 if isinstance(s, ir.Load) else 0
