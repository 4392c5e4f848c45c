"""Experts: finds the expert of a GEMM's tile of rows, and sorts rows by expert.

Rows of an expert are contiguous, in order; `ends` has the end of each expert's rows. Nothing is
read back by the host: programs find their rows on the device, and some have none.
"""

import triton
import triton.language as tl


@triton.jit
def find_expert_tile(
    ends_ptr, status_ptr, tokens, EXPERTS: tl.constexpr, SLOTS: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, N_MASKED: tl.constexpr, M_TILE: tl.constexpr, N_TILE: tl.constexpr,
):  # fmt: skip
    # One slot more than experts: the rows behind the last one's, which nothing is multiplied by.
    slot = tl.arange(0, SLOTS)
    last = tl.load(ends_ptr + slot, mask=slot < EXPERTS, other=0)
    past = slot - 1
    first = tl.load(ends_ptr + past, mask=(slot > 0) & (slot <= EXPERTS), other=0)
    wrong = (slot < EXPERTS) & ((last < first) | (last > tokens))
    tl.store(status_ptr, 1, mask=tl.max(wrong.to(tl.int32), 0) > 0)
    first = tl.maximum(first, 0)
    last = tl.where(slot == EXPERTS, tokens, tl.minimum(last, tokens))
    tiles = tl.where(slot <= EXPERTS, tl.cdiv(tl.maximum(last - first, 0), M_TILE), 0)
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum((upto <= tl.program_id(0)).to(tl.int32), 0)
    own = slot == expert
    before = tl.sum(tl.where(own, upto - tiles, 0), 0)
    row = tl.sum(tl.where(own, first, 0), 0) + (tl.program_id(0) - before) * M_TILE
    n_tile = tl.program_id(1)
    m = row + tl.arange(0, M_TILE)[:, None]
    n = n_tile * N_TILE + tl.arange(0, N_TILE)[None, :]
    m_ok = m < tl.sum(tl.where(own, last, 0), 0)
    n_ok = n < N if N_MASKED else True
    end = tl.where(expert < EXPERTS, K, 0)
    return expert, n_tile, m, n, m_ok, n_ok, end


@triton.jit
def route(chosen_ptr, order_ptr, place_ptr, ends_ptr, rows, experts, TILE: tl.constexpr):
    # One program an expert: how many rows stand before its own, then each of those in turn.
    below = tl.zeros((TILE,), tl.int32)
    same = tl.zeros((TILE,), tl.int32)
    expert = tl.program_id(0)
    for start in range(0, rows, TILE):
        row = start + tl.arange(0, TILE)
        chosen = tl.load(chosen_ptr + row, mask=row < rows, other=experts)
        below += (chosen < expert).to(tl.int32)
        same += (chosen == expert).to(tl.int32)
    place = tl.sum(below, 0)
    tl.store(ends_ptr + expert, place + tl.sum(same, 0))
    for start in range(0, rows, TILE):
        row = start + tl.arange(0, TILE)
        chosen = tl.load(chosen_ptr + row, mask=row < rows, other=experts)
        own = (chosen == expert).to(tl.int32)
        at = place + tl.cumsum(own, 0) - own
        tl.store(place_ptr + row, at.to(tl.int64), mask=own > 0)
        tl.store(order_ptr + at, row.to(tl.int64), mask=own > 0)
        place += tl.sum(own, 0)
