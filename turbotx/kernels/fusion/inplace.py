"""In place: which output of a kernel may reuse the memory of which input.

In: a kernel. Out: pairs (output param, input param) that may safely occupy the same bytes: each
element of the input is read only where the output's is computed, and not after it is stored, in the
loops that the printers write, for example::

    fused_add_gelu: gelu[row, col] = f(linear[row, col], bias[col])  ->  (gelu, linear)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from turbotx import ir
from turbotx.kernels.cpp.sequential import make_sequential
from turbotx.kernels.cpp.sweeps import Sweeps


@lru_cache(maxsize=1024)  # layers share kernels
def find_inplace(kernel: ir.Kernel) -> tuple[tuple[str, str], ...]:
    """Return the pairs that are safe in both C++ and Triton, for any schedule."""
    # C++ takes a variance in two column loops, a looped Triton row in one: what a statement waits
    # for, and with it what may be read after a store, is another thing in each.
    printed = (Sweeps(make_sequential(kernel)), Sweeps(kernel))
    params = {p.name: p for p in kernel.params}
    touched: dict[str, list[ir.Access]] = {}
    for s in kernel.body:
        if isinstance(s, (ir.Load, ir.Store)):
            touched.setdefault(s.access.param, []).append(s.access)
    return tuple(
        (out, given)
        for out in touched
        for given in touched
        if (params[out].role, params[given].role) == ("out", "in")
        and params[out].dtype == params[given].dtype
        and _same_places(kernel, touched[out], touched[given])
        and all(_stored_last(sweeps, out, given) for sweeps in printed)
    )


def _same_places(kernel: ir.Kernel, written: list[ir.Access], read: list[ir.Access]) -> bool:
    """Return whether each iteration reads only the element that it writes."""
    loops = {a.symbol for a in kernel.axes if a.extent != 1}
    first = written[0]
    return (
        len(written) == 1
        and first.mask is None
        and loops <= first.offset.free_symbols  # each element is written in one iteration
        and all(a.offset == first.offset and a.mask is None for a in read)
    )


def _stored_last(sweeps: Sweeps, out: str, given: str) -> bool:
    """Return whether nothing reads `given` after `out` is stored.

    Every loop loads what it needs again, and within one a load comes before its uses: so the stored
    value must depend on all loads, and no later loop may depend on any. (On a GPU that also orders
    threads: a stored value depends on the thread that loaded it.)
    """
    body = sweeps.kernel.body
    loads = {s.result for s in body if isinstance(s, ir.Load) and s.access.param == given}
    (store,) = (s for s in body if isinstance(s, ir.Store) and s.access.param == out)
    later = [
        s for s in body
        if isinstance(s, (ir.Reduce, ir.Store)) and sweeps.of(s) > sweeps.of(store)
    ]  # fmt: skip
    if not loads <= _needed(sweeps, [store], across=True):
        return False
    return not loads & _needed(sweeps, later, across=False)


def _needed(sweeps: Sweeps, ends: Sequence[ir.Statement], across: bool) -> set[str]:
    """Return the values that statements depend on; `across`: also those before reductions, which
    earlier loops compute."""
    checks = [s for s in sweeps.kernel.body if isinstance(s, ir.Check)]
    found: set[str] = set()
    todo = [v for s in ends for v in ir.needs_of(s)]
    while todo:
        v = todo.pop()
        maker = sweeps.makers[v]
        if v in found or (isinstance(maker, ir.Reduce) and not across):
            continue
        found.add(v)
        todo += ir.needs_of(maker)
        todo += [c.mask for c in checks if c.value == v and c.mask]
    return found
