"""Simplify a lowered kernel: drop dead statements, merge loops that always move together, name
axes.

In: a kernel directly after lowering. Out: an equivalent kernel with the fewest axes; for example
(batch, seq, 384) read and written densely becomes (row, col) with batch*seq rows::

    x[@a0*seq*384 + @a1*384 + @a2]  ->  x[@row*384 + @col]
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod

from turbotx import ir
from turbotx.ir.expr import ZERO, Expr, product


def tidy(kernel: ir.Kernel) -> tuple[ir.Kernel, frozenset[str]]:
    """Return the simplified kernel and the names of its remaining params."""
    kernel = drop_dead(kernel)
    kernel = merge_axes(kernel)
    kernel = name_axes(kernel)
    used = {s.access.param for s in kernel.body if isinstance(s, (ir.Load, ir.Store))}
    kernel = replace(kernel, params=tuple(p for p in kernel.params if p.name in used))
    return separate_names(kernel), frozenset(used)


def drop_dead(kernel: ir.Kernel) -> ir.Kernel:
    """Keep the statements that stores depend on; a check is kept as long as the value it checks is
    used."""
    live: set[str] = set()
    kept: list[ir.Statement] = []

    for s in reversed(kernel.body):
        wanted = (s.value,) if isinstance(s, ir.Check) else ir.results_of(s)
        if isinstance(s, ir.Store) or not live.isdisjoint(wanted):
            live.update(ir.needs_of(s))
            kept.append(s)
    return replace(kernel, body=tuple(reversed(kept)))


def merge_axes(kernel: ir.Kernel) -> ir.Kernel:
    """Merge adjacent axes (outer, inner) if every offset moves along them as along one loop."""
    axes = list(kernel.axes)
    k = 0
    while k + 1 < len(axes):
        outer, inner = axes[k], axes[k + 1]
        if outer.kind == inner.kind and all(_together(e, outer, inner) for e in _offsets(kernel)):
            merged = ir.Axis(inner.name, product((outer.extent, inner.extent)), inner.kind)
            kernel = substitute(kernel, {outer.symbol: ZERO})
            axes[k : k + 2] = [merged]
            k = max(k - 1, 0)
        else:
            k += 1
    return replace(kernel, axes=tuple(axes))


def _together(value: Expr, outer: ir.Axis, inner: ir.Axis) -> bool:
    if not value.has(outer.symbol) and not value.has(inner.symbol):
        return True
    if value.has(FloorDiv, Mod):
        return False
    steps = [sympy.diff(value, a.symbol) for a in (outer, inner)]
    return sympy.expand(steps[0] - steps[1] * inner.extent) == 0


def _offsets(kernel: ir.Kernel) -> list[Expr]:
    return [e for e in kernel.expressions() if any(s.name[0] == "@" for s in e.free_symbols)]


def substitute(kernel: ir.Kernel, what: dict[sympy.Symbol, Expr]) -> ir.Kernel:
    """Return the kernel with symbols replaced in every offset and index."""

    def change(value: Expr) -> Expr:
        return sympy.expand(value.xreplace(what))

    body: list[ir.Statement] = []
    for s in kernel.body:
        if isinstance(s, (ir.Load, ir.Store)):
            s = replace(s, access=replace(s.access, offset=change(s.access.offset)))
        elif isinstance(s, ir.Index):
            s = replace(s, value=change(s.value))
        body.append(s)
    return replace(kernel, body=tuple(body))


def name_axes(kernel: ir.Kernel) -> ir.Kernel:
    """Name parallel axes row, row1, … from the innermost outwards, and reduced ones col, col1, ….

    Without a reduction the innermost parallel axis, along which vectors run, is col.
    """
    rows, columns = list(kernel.rows), list(kernel.columns)
    vector = [rows.pop()] if rows and not columns else []
    names: dict[str, str] = {}
    for group, base in ((rows, "row"), (vector + columns, "col")):
        for k, axis in enumerate(reversed(group)):
            names[axis.name] = f"{base}{k}" if k else base
    kernel = substitute(kernel, {a.symbol: ir.axis_symbol(names[a.name]) for a in kernel.axes})
    return replace(kernel, axes=tuple(replace(a, name=names[a.name]) for a in kernel.axes))


def _rename_params(kernel: ir.Kernel, taken: Collection[str]) -> ir.Kernel:
    own = {p.name for p in kernel.params}
    names = {n: n for n in own}
    for name in own & {*taken}:
        while names[name] in taken or names[name] in own:
            names[name] += "_"
    body = tuple(
        replace(s, access=replace(s.access, param=names[s.access.param]))
        if isinstance(s, (ir.Load, ir.Store))
        else s
        for s in kernel.body
    )
    params = tuple(replace(p, name=names[p.name]) for p in kernel.params)
    return replace(kernel, params=params, body=body)


def separate_names(kernel: ir.Kernel) -> ir.Kernel:
    """Rename params that are called like an axis or a size, and values like any of them, so that
    printed names are unique."""
    taken = {a.name for a in kernel.axes} | set(kernel.sizes)
    if any(p.name in taken for p in kernel.params):
        kernel = _rename_params(kernel, taken)
    taken |= {p.name for p in kernel.params}
    new: dict[str, str] = {}
    for s in kernel.body:
        for name in ir.results_of(s):
            fresh = name
            while fresh in taken:
                fresh += "_"
            taken.add(fresh)
            new[name] = fresh
    symbols = {ir.value_symbol(a): ir.value_symbol(b) for a, b in new.items() if a != b}
    kernel = substitute(kernel, symbols) if symbols else kernel
    return replace(kernel, body=tuple(ir.rename(s, new) for s in kernel.body))
