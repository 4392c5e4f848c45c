"""Cache ops: what a decoder does with its key/value cache, as one op of PyTorch that traces keep.

In: the memory of a whole cache, (elements a position, batch, capacity), the new rows of one layer's
keys or values, (batch, heads, rows, width), and a tensor of no elements whose first size is the
length of the cache afterwards. Out: every row, old and new, (batch, heads, length, width)::

    keys = torch.ops.turbotx.cache_append(memory, rows, length, place, layer, 0)

`passes.cache` puts `cache_store` in its place where attention alone reads the rows.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

_library = torch.library.Library("turbotx", "DEF")
_library.define(
    "cache_append(Tensor memory, Tensor rows, Tensor length, int place, int layer, int part)"
    " -> Tensor"
)


def block_of(memory: torch.Tensor, place: int, heads: int, width: int) -> torch.Tensor:
    """Return one layer's keys or values in a cache's memory, (batch, heads, capacity, width).

    memory: dense, (elements a position, batch, capacity). place: the elements a position of what
    lies before it.
    """
    batch, capacity = memory.shape[1:]
    size = heads * width * batch * capacity
    flat = memory.view(-1).narrow(0, place * batch * capacity, size)
    return flat.view(batch, heads, capacity, width)


def cache_append(
    memory: torch.Tensor, rows: torch.Tensor, length: torch.Tensor,
    place: int, layer: int, part: int,
) -> torch.Tensor:  # fmt: skip
    """Store `rows` in `memory` as the last ones of `length`, and return a copy of all.

    place: see `block_of`. layer, part: which layer's, 0 for keys and 1 for values; they are for
    who reads the graph. Nothing else in a graph reads the memory, so that the op counts as
    one without a side effect; it may be run again.
    """
    return cache_store(memory, rows, length, place).clone(memory_format=torch.contiguous_format)


def cache_store(
    memory: torch.Tensor, rows: torch.Tensor, length: torch.Tensor, place: int
) -> torch.Tensor:
    """Store rows as `cache_append` does, and return all of them where they lie in `memory`."""
    _, heads, count, width = rows.shape
    if isinstance(rows, FakeTensor):
        return rows.new_empty(rows.shape[0], heads, length.shape[0], width)
    after = length.shape[0]
    block = block_of(memory, place, heads, width)
    block[:, :, after - count : after] = rows
    return block[:, :, :after]


def store_rows(
    memory: torch.Tensor, rows: torch.Tensor, length: torch.Tensor, place: int
) -> tuple[()]:
    """`cache_store` for who needs no result: a launch that PyTorch runs."""
    cache_store(memory, rows, length, place)
    return ()


def _fake_cache_append(
    memory: torch.Tensor, rows: torch.Tensor, length: torch.Tensor,
    place: int, layer: int, part: int,
) -> torch.Tensor:  # fmt: skip
    torch._check(memory.shape[1] == rows.shape[0])
    torch._check(memory.shape[2] >= length.shape[0])
    return rows.new_empty(rows.shape[0], rows.shape[1], length.shape[0], rows.shape[3])


_library.impl("cache_append", cache_append, "CompositeExplicitAutograd")
torch.library.register_fake("turbotx::cache_append", _fake_cache_append, lib=_library)
