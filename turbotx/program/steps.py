"""Steps on a GPU: which launches of a decoder depend on how much of its cache is filled.

In: an assembly whose attention stores rows in a cache, and the sizes that it was traced with. Out:
which dims grow with every step, so that kernels read them on the device; memory for what the parts
of a split attention leave; for GPT-2::

    find_steps(assembly, dims, example)  ->  GrowingDims({"length", "attention_mask_d1"}, ...)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from sympy import Integer

from turbotx import ir
from turbotx.kernels.cache_jobs import split_workspace_size
from turbotx.kernels.schedule import outer_axes
from turbotx.program.assembly import Assembly

# (new tokens, capacity of the cache): steps with keys in one part and in many, prompts as in calls
# without a cache.
EXPECTED_STEPS = (
    (1, 64), (1, 1024), (17, 64), (40, 64), (256, 256), (250, 256), (512, 512), (500, 512),
)  # fmt: skip


@dataclass(frozen=True)
class GrowingDims:
    """dims: names of those that grow with every step. cache: the input that launches store rows in.
    room: the dims whose product bounds how many there are, rows of a block and columns of a table.
    query: that of new rows, None for a number."""

    dims: frozenset[str]
    cache: str
    room: tuple[str, str]
    query: str | None

    def move(self, *values: Any) -> bool:
        """Return whether any of these sizes depends on the growing dims."""
        return any(
            s.name in self.dims
            for v in values if isinstance(v, sympy.Basic)
            for s in v.free_symbols if isinstance(s, sympy.Symbol)
        )  # fmt: skip


def find_steps(
    assembly: Assembly, dims: Sequence[str], example_dims: Sequence[int]
) -> GrowingDims | None:
    """Return what grows with every step; None where nothing is stored in a cache, or where a launch
    cannot read on the device what grows: PyTorch's, a GEMM's, one that reduces rows that grow."""
    launches = assembly.launches
    stores = [x for x in launches if isinstance(x, ir.AttentionLaunch) and x.kernel.stores]
    if not stores:
        return None
    *_, query, length = stores[0].sizes[:5]
    columns, rows = stores[0].sizes[-2:]
    if not all(isinstance(x, sympy.Symbol) for x in (length, columns, rows)):
        return None
    traced = dict(zip(dims, example_dims, strict=True))
    names = frozenset(n for n, size in traced.items() if size == traced[str(length)])
    new = query.name if isinstance(query, sympy.Symbol) else None
    cache = stores[0].writes[-1]
    steps = GrowingDims(names, cache, (str(rows), str(columns)), new)
    return steps if all(_can_follow(x, steps) for x in assembly.launches) else None


def _can_follow(launch: ir.Launch, steps: GrowingDims) -> bool:
    """Return whether a launch's kernel can read growing sizes on the device."""
    operands = [a for a in launch.operands if a is not None]
    if steps.move(*(a.offset for a in operands)):
        return False
    if isinstance(launch, ir.AttentionLaunch):
        return True
    if any(a.tensor == steps.cache for a in operands):
        return False
    if isinstance(launch, ir.KernelLaunch):  # `KernelFamily` masks the last rows
        kernel = launch.kernel
        return not kernel.columns or not steps.move(*(a.extent for a in outer_axes(kernel)))
    given = [e for a in operands for e in (*a.shape, *a.strides)]
    if isinstance(launch, ir.AtenLaunch):
        given += pytree.tree_leaves((launch.call.args, dict(launch.call.kwargs)))
    return not steps.move(*given, *launch.sizes)


def expected_steps(dims: Sequence[str], steps: GrowingDims) -> Iterable[tuple[int, ...]]:
    """Yield the dims of calls whose kernels are built ahead: prompts and steps."""
    for query, capacity in EXPECTED_STEPS:
        rows, columns = steps.room
        known = dict.fromkeys(steps.dims, capacity) | {rows: 64, columns: capacity // 64}
        if steps.query is not None:
            known[steps.query] = query
        yield tuple(known.get(name, 1) for name in dims)


def add_split_workspaces(assembly: Assembly) -> None:
    """Give attention over a cache a workspace for the partial results of splitting its keys."""
    for i, launch in enumerate(assembly.launches):
        if isinstance(launch, ir.AttentionLaunch) and launch.kernel.stores:
            name = f"{launch.name}_sums_of_parts"
            shape = (Integer(split_workspace_size(launch.kernel)),)
            assembly.tensors[name] = ir.Tensor(name, "intermediate", torch.float32, shape)
            assembly.launches[i] = replace(launch, workspaces=(name,))


def is_split(launch: ir.Launch, steps: GrowingDims | None) -> bool:
    """Return whether an attention launch may be split along a cache whose length is read on the
    device; its query heads must be a multiple of its key heads."""
    if steps is None or not isinstance(launch, ir.AttentionLaunch) or not launch.workspaces:
        return False
    heads: Iterable[Any] = launch.sizes[1:3]
    return all(h.is_Integer for h in heads)
