"""Cache stores: what writes one layer's new keys and values into a cache, and where its blocks lie.

In: the operand of a layer's rows in the cache's memory, and the new rows. Out: the size arguments
of `ttx_store_rows`, with strides in bytes::

    sizes: batch, heads, rows, bytes per row; strides of batch, head and row; position of the first
           one; columns of the block table, rows per block and bytes per element
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sympy import Integer
from torch import fx

from turbotx import ir
from turbotx.ir import fx_nodes as g
from turbotx.ir.cache_ops import attend_and_store, cache_store
from turbotx.ir.expr import ONE, ZERO, Expr, expr, product
from turbotx.kernels.cpp.attention import SIZES
from turbotx.passes.partition import root_of
from turbotx.program.assembly import Assembly
from turbotx.program.executable import CONTIGUOUS_CACHE


def describe_store(held: ir.Operand, new: ir.Operand) -> tuple[Expr, ...]:
    """Return a store's sizes, without those of blocks.

    held: all rows of a layer after the call, (batch, heads, length, width), in the cache's memory.
    new: (batch, heads, rows, width), stored last; its last dim must be contiguous.
    """
    batch, heads, count, width = new.shape
    nbytes = new.dtype.itemsize
    steps = [s * nbytes for s in new.strides[:3]]
    return batch, heads, count, width * nbytes, *steps, held.shape[2] - count


def describe_blocks(
    store: fx.Node, name_of: Callable[[fx.Node], str]
) -> tuple[ir.Operand, ir.Operand, tuple[Expr, Expr]]:
    """Return the cache's memory from its first element, the layer's row of the block table, and the
    sizes (columns of the table, rows per block) of a `cache_store`."""
    memory, table = g.operand(store, 0), g.operand(store, 1)
    _, batch, columns = g.shape(table)
    whole = ir.Operand(name_of(memory), g.dtype(memory), (), (), ZERO)
    row = ir.Operand(
        name_of(table), g.dtype(table), (batch, columns), (columns, ONE),
        product((expr(store.args[5]), batch, columns)),
    )  # fmt: skip
    return whole, row, (columns, g.shape(memory)[2])


def find_blocks(
    node: fx.Node, name_of: Callable[[fx.Node], str]
) -> tuple[tuple[ir.Operand | None, ...], tuple[Expr, ...]]:
    """Return an attention's `blocks` operands and their sizes; both empty if neither keys nor
    values lie in a cache."""
    given = [root_of(g.operand(node, i)) for i in (1, 2)]
    found = [describe_blocks(n, name_of) if n.target is cache_store else None for n in given]
    first = next((x for x in found if x is not None), None)
    if first is None:
        return (), ()
    return (first[0], *(None if x is None else x[1] for x in found)), first[2]


def require_room(held: ir.Operand, columns: Expr, capacity: Expr) -> tuple[Expr, str]:
    """Return the requirement that the cache has capacity for the call's rows."""
    length = held.shape[2]
    return product((capacity, columns)) - length, f"{length} positions in a cache's memory"


def fuse_stores(assembly: Assembly) -> None:
    """Merge the two launches that store a layer's new keys and values in a cache into the attention
    that reads them, if nothing else reads them and there is a query for each row."""
    stores = {x.blocks[1]: x for x in assembly.launches if isinstance(x, ir.StoreLaunch)}
    reads = Counter(
        table
        for x in assembly.launches if isinstance(x, ir.AttentionLaunch) for table in x.blocks[1:]
    )  # fmt: skip
    fused: dict[str, ir.Launch | None] = {}
    for launch in assembly.launches:
        if not isinstance(launch, ir.AttentionLaunch) or not launch.blocks:
            continue
        rows = [stores.get(x) for x in launch.blocks[1:] if x is not None and reads[x] == 1]
        batch, _, kv_heads, count = launch.sizes[:4]
        shape = batch, kv_heads, count, Integer(launch.kernel.head_dim)
        if all(x is not None and x.new.shape == shape for x in rows) and len(rows) == 2:
            fused |= {x.name: None for x in rows if x is not None}
            fused[launch.name] = _with_stores(launch, *rows)
    made = [fused.get(x.name, x) for x in assembly.launches]
    assembly.launches[:] = [x for x in made if x is not None]


def _with_stores(launch: ir.AttentionLaunch, keys: Any, values: Any) -> ir.AttentionLaunch:
    """Return attention over a cache that stores the rows of two launches first."""
    q, _, _, *masks = launch.call.args
    memory, table, _, length, k_place, k_index = keys.call.args
    *_, v_place, v_index = values.call.args
    given = memory, table, length, (k_place, v_place), (k_index, v_index), q, keys.new, values.new
    call = replace(launch.call, target=attend_and_store, args=(*given, *masks))
    steps = {f"{n}.{d}": s for n, new in (("k", keys.new), ("v", values.new))
             for d, s in zip(("batch", "head", "row"), new.strides, strict=False)}  # fmt: skip
    named = zip(SIZES, launch.extents, strict=False)
    extents = (*(steps.get(n, e) for n, e in named), *launch.extents[len(SIZES) :])
    source = ", ".join((keys.source, values.source, launch.source))
    kernel = replace(launch.kernel, stores=True)
    return replace(
        launch, kernel=kernel, k=keys.new, v=values.new, extents=extents, call=call, source=source
    )


def use_contiguous(assembly: Assembly) -> None:
    """Make launches over a cache read contiguous memory, and require calls without a block table.
    Attention that stores rows is left alone: it reads the table of any memory."""
    for i, launch in enumerate(assembly.launches):
        if isinstance(launch, ir.AttentionLaunch) and launch.kernel.stores:
            continue
        if isinstance(launch, (ir.AttentionLaunch, ir.StoreLaunch)) and launch.blocks:
            table = next(t for t in launch.blocks[1:] if t is not None)
            less = 3 if isinstance(launch, ir.StoreLaunch) else 2
            plain = replace(launch, blocks=(), extents=launch.extents[:-less])
            if isinstance(plain, ir.AttentionLaunch):
                plain = replace(plain, kernel=replace(plain.kernel, cached=False))
            assembly.launches[i] = plain
            assembly.requirements.append((ONE - table.shape[1], CONTIGUOUS_CACHE))
