"""In place: which output of a kernel may take over the memory of which input.

In: a kernel. Out: pairs (output param, input param) for which it is safe that both are the same
bytes: every element of the input is read only where the output's element at the same place is
computed, and before it is stored, for example::

    fused_add_gelu: gelu[row, col] = f(linear[row, col], bias[col])  ->  (gelu, linear)
"""

from __future__ import annotations

from turbotx import ir


def find_inplace(kernel: ir.Kernel) -> tuple[tuple[str, str], ...]:
    """Return the safe pairs. Stores of an early sweep would be read by later ones: none then."""
    if not _stores_come_last(kernel):
        return ()
    stores: dict[str, list[ir.Access]] = {}
    loads: dict[str, list[ir.Access]] = {}
    for s in kernel.body:
        if isinstance(s, ir.Store):
            stores.setdefault(s.access.param, []).append(s.access)
        elif isinstance(s, ir.Load):
            loads.setdefault(s.access.param, []).append(s.access)
    params = {p.name: p for p in kernel.params}
    loops = {a.symbol for a in kernel.axes if a.extent != 1}
    return tuple(
        (out, given)
        for out, written in stores.items()
        for given, read in loads.items()
        if len(written) == 1
        and written[0].mask is None
        and loops <= written[0].offset.free_symbols  # each place is written in one iteration
        and params[out].dtype == params[given].dtype
        and all(a.offset == written[0].offset and a.mask is None for a in read)
    )


def _stores_come_last(kernel: ir.Kernel) -> bool:
    """Tell whether every store waits for every reduction (or there is none)."""
    phase: dict[str, int] = {}
    stored: set[int] = set()
    last = 0
    for s in kernel.body:
        below = max((phase[n] for n in ir.needs_of(s)), default=0)
        if isinstance(s, ir.Store):
            stored.add(below)
        if isinstance(s, ir.Reduce):
            last = max(last, below + 1)
        for name in ir.results_of(s):
            phase[name] = below + isinstance(s, ir.Reduce)
    return stored == {last}
