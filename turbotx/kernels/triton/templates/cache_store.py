"""Rows of a decoder's layer go behind those that its cache holds. One program a tile of rows of one
head."""

import triton
import triton.language as tl

WIDTH = tl.constexpr(None)  # elements of a row
DEPTH = tl.constexpr(None)  # the power of two above


@triton.jit
def cache_store(
    new_ptr, held_ptr, count, first, new_batch, new_head, new_row, held_batch, held_head,
    R_TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R_TILE + tl.arange(0, R_TILE)[:, None]
    head = tl.program_id(1).to(tl.int64)
    batch_index = tl.program_id(2).to(tl.int64)
    dim = tl.arange(0, DEPTH)[None, :]
    ok = (row < count) & (dim < WIDTH) if DEPTH != WIDTH else row < count
    new_ptr += batch_index * new_batch + head * new_head
    held_ptr += batch_index * held_batch + head * held_head
    x = tl.load(new_ptr + row.to(tl.int64) * new_row + dim, mask=ok)
    tl.store(held_ptr + (first + row).to(tl.int64) * WIDTH + dim, x, mask=ok)
