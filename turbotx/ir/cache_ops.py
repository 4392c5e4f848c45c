"""Cache ops: a decoder's updates of its key/value cache, as one PyTorch op that traces keep.

In: the memory of a whole cache, (elements per position, batch, capacity), its block table, the new
rows of one layer's keys or values, (batch, heads, rows, width), and an empty tensor whose first
size is the length of the cache after the call. Out: all rows, old and new, (batch, heads, length,
width)::

    keys = torch.ops.turbotx.cache_append(memory, table, rows, length, place, layer, 0)

A table of int64, (2 x layers, batch, columns), says where in memory, in elements, blocks of
`capacity` rows begin, (heads, capacity, width) each: row 2 * layer + part is for the keys (0) or
values (1) of a layer. With one column the memory may be contiguous, see `block_of`.

`passes.cache` puts `cache_store` in its place where attention alone reads the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from turbotx.ir.attention_ops import attention

_library = torch.library.Library("turbotx", "DEF")
_library.define(
    "cache_append(Tensor memory, Tensor table, Tensor rows, Tensor length, int place, int layer,"
    " int part) -> Tensor"
)


def block_of(memory: torch.Tensor, place: int, heads: int, width: int) -> torch.Tensor:
    """Return one layer's keys or values in contiguous memory, (batch, heads, capacity, width).

    memory: dense, (elements per position, batch, capacity).
    place: elements per position of the layers before it.
    """
    batch, capacity = memory.shape[1:]
    size = heads * width * batch * capacity
    flat = memory.view(-1).narrow(0, place * batch * capacity, size)
    return flat.view(batch, heads, capacity, width)


def cache_append(
    memory: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, length: torch.Tensor,
    place: int, layer: int, part: int,
) -> torch.Tensor:  # fmt: skip
    """Store `rows` as the last ones of `length` positions; return a copy of all rows.

    place: see `block_of`.
    layer, part: the layer, and 0 for keys or 1 for values. Nothing else in a graph reads the
    memory, so the op may be treated as free of side effects and run again.
    """
    windows = list(find_blocks(memory, table[2 * layer + part], rows.shape[1], rows.shape[3]))
    _store_by_table(windows, memory.shape[2], rows, length.shape[0])
    return _gather(windows, rows, length.shape[0])


def find_blocks(
    memory: torch.Tensor, table: torch.Tensor, heads: int, width: int
) -> Iterator[list[torch.Tensor]]:
    """Yield the blocks of each row of a batch, (heads, capacity, width) each; table: (batch,
    columns)."""
    size = (heads, memory.shape[2], width)
    flat = memory.view(-1)
    for places in table.tolist():
        yield [flat.narrow(0, place, math.prod(size)).view(size) for place in places]


def _store_by_table(
    windows: Sequence[Sequence[torch.Tensor]], capacity: int, rows: torch.Tensor, after: int
) -> None:
    position = after - rows.shape[2]
    while position < after:
        column, first = divmod(position, capacity)
        end = min(after, (column + 1) * capacity)
        begin = position - after + rows.shape[2]
        for blocks, new in zip(windows, rows, strict=True):
            held = blocks[column][:, first : first + end - position]
            held.copy_(new[:, begin : begin + end - position])
        position = end


def _gather(
    windows: Sequence[Sequence[torch.Tensor]], rows: torch.Tensor, after: int
) -> torch.Tensor:
    batch, heads, _, width = rows.shape
    every = [torch.cat(list(blocks), 1)[:, :after] for blocks in windows]
    return torch.stack(every) if batch else rows.new_empty(0, heads, after, width)


def cache_store(
    memory: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, length: torch.Tensor,
    place: int, index: int,
) -> torch.Tensor:  # fmt: skip
    """Store rows as `cache_append` does; return a view of all of them in `memory`, which must be
    contiguous: only launches read and write blocks.

    index: row of the table.
    """
    _, heads, count, width = rows.shape
    if isinstance(rows, FakeTensor):
        return rows.new_empty(rows.shape[0], heads, length.shape[0], width)
    after = length.shape[0]
    block = block_of(memory, place, heads, width)
    block[:, :, after - count : after] = rows
    return block[:, :, :after]


def store_rows(
    memory: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, length: torch.Tensor,
    place: int, index: int,
) -> tuple[()]:  # fmt: skip
    """As `cache_store`, without a result: for launches that PyTorch runs."""
    cache_store(memory, table, rows, length, place, index)
    return ()


def attend_and_store(
    memory: torch.Tensor, table: torch.Tensor, length: torch.Tensor,
    places: Sequence[int], indices: Sequence[int], q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, *masks: torch.Tensor | None, **said: Any,
) -> torch.Tensor:  # fmt: skip
    """Store new rows k and v as `cache_append` does, and return `attention` of q over all.

    places, indices: of keys and of values, see `cache_store`. masks, said: what attention takes.
    """
    held = [
        cache_append(memory, table, rows, length, place, *divmod(index, 2))
        for rows, place, index in zip((k, v), places, indices, strict=True)
    ]
    return attention(q, *held, *masks, **said)


def _fake_cache_append(
    memory: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, length: torch.Tensor,
    place: int, layer: int, part: int,
) -> torch.Tensor:  # fmt: skip
    torch._check(memory.shape[1] == rows.shape[0])
    torch._check(table.shape[1] == rows.shape[0])
    return rows.new_empty(rows.shape[0], rows.shape[1], length.shape[0], rows.shape[3])


_library.impl("cache_append", cache_append, "CompositeExplicitAutograd")
torch.library.register_fake("turbotx::cache_append", _fake_cache_append, lib=_library)
