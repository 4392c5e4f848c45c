"""Horizontal fusion: merges two kernels that compute the same on adjacent parts of a tensor.

In: two lowered kernels without reductions that differ in one axis. Out: one whose axis runs over
the first part and then over the second, with a store for each part; None if their bodies differ.
For example the rotary embedding of 32 query heads and of the 8 key heads after them in a packed
GEMM's output::

    for head in 32: q[head] = f(qkv[head])       for head in 40: y = f(qkv[head])
    for head in 8:  k[head] = f(qkv[head + 32])      q[head] = y      if head < 32
                                                    k[head - 32] = y if head >= 32
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from turbotx import ir
from turbotx.kernels.lowering.lower import Lowered
from turbotx.kernels.lowering.simplify_axes import separate_names, substitute

INDEX, END, FIRST, SECOND = "part", "first_part", "in_first", "in_second"


def fuse_horizontally(first: Lowered, second: Lowered) -> Lowered | None:
    """Return one kernel that computes both, or None if they differ too much."""
    a, b = first.kernel, second.kernel
    axis = _find_axis(a, b)
    if axis is None:
        return None
    shift = {axis.symbol: axis.symbol - axis.extent}
    params = _match_params(first, second)
    body = _match_bodies(a, substitute(b, shift), params)
    if body is None:
        return None
    added = tuple(
        replace(p, name=params[p.name])
        for p in b.params
        if params[p.name] not in {q.name for q in a.params}
    )
    other = next(x for x in b.axes if x.name == axis.name)
    axes = tuple(replace(x, extent=x.extent + other.extent) if x == axis else x for x in a.axes)
    sources = tuple(dict.fromkeys(a.sources + b.sources))
    kernel = ir.Kernel(a.name, a.params + added, axes, (*_which_part(axis), *body), sources)
    known = {q.name for q in a.params}
    behind = zip(b.params, second.operands, strict=True)
    operands = first.operands + tuple(n for p, n in behind if params[p.name] not in known)
    requirements = tuple(dict.fromkeys(first.requirements + second.requirements))
    return Lowered(separate_names(kernel), operands, requirements)


def _find_axis(a: ir.Kernel, b: ir.Kernel) -> ir.Axis | None:
    """Return the only axis of `a` whose extent differs in `b`."""
    if a.columns or b.columns or [x.name for x in a.axes] != [x.name for x in b.axes]:
        return None
    differing = [x for x, y in zip(a.axes, b.axes, strict=True) if x != y]
    return differing[0] if len(differing) == 1 else None


def _match_params(first: Lowered, second: Lowered) -> dict[str, str]:
    """Map the second kernel's param names to those of the merged kernel: equal tensors become
    one."""
    names = {n: p.name for p, n in zip(first.kernel.params, first.operands, strict=True)}
    taken = set(names.values())
    found: dict[str, str] = {}
    for p, node in zip(second.kernel.params, second.operands, strict=True):
        name, k = names.get(node, p.name), 1
        while node not in names and name in taken:
            name, k = f"{p.name}{k}", k + 1
        taken.add(name)
        found[p.name] = name
    return found


def _match_bodies(
    a: ir.Kernel, b: ir.Kernel, params: Mapping[str, str]
) -> tuple[ir.Statement, ...] | None:
    """Return a body for both, with masked stores; None if a statement differs."""
    if len(a.body) != len(b.body):
        return None
    names: dict[str, str] = {}
    body: list[ir.Statement] = []
    for s, t in zip(a.body, b.body, strict=True):
        if type(s) is not type(t):
            return None
        names.update(zip(ir.results_of(t), ir.results_of(s), strict=False))
        t = _translate(t, names, params)
        if isinstance(s, ir.Store) and isinstance(t, ir.Store):
            if s.value != t.value or s.access.mask or t.access.mask:
                return None
            body.append(replace(s, access=replace(s.access, mask=FIRST)))
            body.append(replace(t, access=replace(t.access, mask=SECOND)))
        elif s == t:
            body.append(s)
        else:
            return None
    return tuple(body)


def _translate(
    s: ir.Statement, names: Mapping[str, str], params: Mapping[str, str]
) -> ir.Statement:
    """Rewrite a statement of the second kernel with the first one's names."""
    s = ir.rename(s, names)
    symbols = {ir.value_symbol(old): ir.value_symbol(new) for old, new in names.items()}
    if isinstance(s, (ir.Load, ir.Store)):
        offset = s.access.offset.xreplace(symbols)
        return replace(s, access=replace(s.access, param=params[s.access.param], offset=offset))
    return replace(s, value=s.value.xreplace(symbols)) if isinstance(s, ir.Index) else s


def _which_part(axis: ir.Axis) -> tuple[ir.Statement, ...]:
    known = axis.extent.is_Integer
    return (
        ir.Index(INDEX, axis.symbol),
        ir.Constant(END, int(axis.extent), torch.int64) if known else ir.Index(END, axis.extent),
        ir.Compute(FIRST, "lt", (INDEX, END), torch.bool),
        ir.Compute(SECOND, "ge", (INDEX, END), torch.bool),
    )
