"""Flash decoding: few queries over a cache, with the keys split into parts.

One program per part of a key head's keys, for all query heads that share it, so that keys and
values are loaded once. Every program stores partial sums; the last one to finish adds all of them,
in order. After Dao et al. 2023 (Flash-Decoding). The number of keys is read from device memory. The
program of the last part also appends the new rows of its head.
"""

import triton
import triton.language as tl

from turbotx.kernels.triton.templates.cached_attention import (
    attend_in_blocks,
    divide_in_blocks,
    find_cache,
    find_tiles,
    store_rows,
)

# As in attention.py.
HEAD_DIM = tl.constexpr(None)
DEPTH = tl.constexpr(None)
STORED = tl.constexpr(None)
PRECISION = tl.constexpr(None)
SCALE = tl.constexpr(None)
CAP = tl.constexpr(None)
KEYS = tl.constexpr(None)
BIAS = tl.constexpr(None)
LEFT = tl.constexpr(None)
RIGHT = tl.constexpr(None)
LATE = tl.constexpr(None)
BLIND_NAN = tl.constexpr(None)
BLIND_MEAN = tl.constexpr(None)
SINKS = tl.constexpr(None)
GROUP = tl.constexpr(None)  # query heads per key head
SPLIT = tl.constexpr(None)  # whether there is more than one part
ROWS = tl.constexpr(None)  # rows of partial sums: queries times heads of a group
PARTS = tl.constexpr(None)  # parts added at once

LOG2E = tl.constexpr(1.4426950408889634)
MOST = tl.constexpr(3.4028234663852886e38)  # of float32


@triton.jit
def begin_sums(sinks_ptr, head, row_ok, Q_TILE: tl.constexpr):
    """The first part has the sinks."""
    if SINKS:
        sink = tl.load(sinks_ptr + head, mask=row_ok, other=float("-inf")) * LOG2E
        largest = tl.where(tl.program_id(0) == 0, sink, float("-inf"))
        total = tl.where(largest == float("-inf"), 0.0, 1.0)
    else:
        largest = tl.full((Q_TILE, 1), float("-inf"), tl.float32)
        total = tl.zeros((Q_TILE, 1), tl.float32)
    values = tl.zeros((Q_TILE, DEPTH), tl.float32)
    return largest, total, values


@triton.jit
def leave_sums(values, largest, total, parts, place, dim, turns_ptr, pair):
    own = parts + tl.program_id(0) * (ROWS * (DEPTH + 2))
    tl.store(own + place * DEPTH + dim, values, mask=place < ROWS)
    tl.store(own + ROWS * DEPTH + place, largest, mask=place < ROWS)
    tl.store(own + ROWS * (DEPTH + 1) + place, total, mask=place < ROWS)
    tl.debug_barrier()
    turn = tl.atomic_add(turns_ptr + pair, 1, sem="acq_rel")
    return turn


@triton.jit
def add_sums(parts):
    part = tl.arange(0, PARTS)[:, None, None]
    at = tl.arange(0, ROWS)[None, :, None]
    across = tl.arange(0, DEPTH)[None, None, :]
    most = tl.full((ROWS, 1), float("-inf"), tl.float32)
    all_values = tl.zeros((ROWS, DEPTH), tl.float32)
    all_total = tl.zeros((ROWS, 1), tl.float32)
    for first_part in range(0, tl.num_programs(0), PARTS):
        there = first_part + part < tl.num_programs(0)
        own = parts + (first_part + part) * (ROWS * (DEPTH + 2))
        # Asked for together: none waits for another.
        its_most = tl.load(
            own + ROWS * DEPTH + at, mask=there, other=float("-inf"), cache_modifier=".cg"
        )
        its_total = tl.load(
            own + ROWS * (DEPTH + 1) + at, mask=there, other=0.0, cache_modifier=".cg"
        )
        its_values = tl.load(own + at * DEPTH + across, mask=there, other=0.0, cache_modifier=".cg")
        more = tl.maximum(most, tl.max(its_most, 0))
        # A query that has seen no key yet has no largest score to subtract.
        shift = tl.where(more == float("-inf"), 0.0, more)
        fade = tl.exp2(most - shift)
        weight = tl.exp2(its_most - shift[None, :, :])
        all_values = all_values * fade + tl.sum(its_values * weight, 0)
        all_total = all_total * fade + tl.sum(its_total * weight, 0)
        most = more
    return all_values, all_total


@triton.jit
def store_rest(quotient, kv_head, q_len, dim, dim_ok, out_ptr, out_head, out_row):
    line = tl.arange(0, ROWS)[:, None]
    its_query = line // GROUP
    its_head = (kv_head * GROUP + line % GROUP).to(tl.int64)
    out_at = out_ptr + its_head * out_head + its_query * out_row + dim
    tl.store(out_at, quotient.to(STORED), mask=(its_query < q_len) & dim_ok)


@triton.jit
def store_few_rows(
    q_len, past, dim, dim_ok, k_ptr, k_row, v_ptr, v_row, head_ptr, k_blocks, v_blocks, block_len
):
    for first_row in range(0, q_len, 16):
        new_row = first_row + tl.arange(0, 16)[:, None]
        store_rows(
            new_row, new_row < q_len, past, dim, dim_ok, k_ptr, k_row, v_ptr, v_row, head_ptr,
            k_blocks, v_blocks, block_len,
        )  # fmt: skip


@triton.jit
def split_attention(
    q_ptr, k_ptr, v_ptr, out_ptr, keys_ptr, bias_ptr, sinks_ptr, cache_ptr, k_table_ptr,
    v_table_ptr, partial_ptr, turns_ptr, batch, heads, kv_heads, q_len, k_len, q_batch, q_head,
    q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    key_mask_stride, bias_batch, bias_head, bias_q, bias_k, columns, block_len,
    Q_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    batch_index = tl.program_id(2).to(tl.int64)
    pair = tl.program_id(2) * kv_heads + kv_head
    # Rows of a tile are the heads of a group, for one query after another.
    place = tl.arange(0, Q_TILE)[:, None]
    query = place // GROUP
    head = kv_head * GROUP + place % GROUP
    row_ok = query < q_len
    dim = tl.arange(0, DEPTH)[None, :]
    dim_ok = dim < HEAD_DIM if DEPTH != HEAD_DIM else True
    q_at = q_ptr + batch_index * q_batch + head.to(tl.int64) * q_head + query * q_row + dim
    q = tl.load(q_at, mask=row_ok & dim_ok, other=0.0)
    k_ptr += batch_index * k_batch + kv_head.to(tl.int64) * k_head
    v_ptr += batch_index * v_batch + kv_head.to(tl.int64) * v_head
    out_ptr += batch_index * out_batch
    head_ptr, k_blocks, v_blocks = find_cache(
        kv_head, batch_index, cache_ptr, k_table_ptr, v_table_ptr, columns, block_len
    )
    past = k_len - q_len
    count = k_len
    if KEYS == "lengths":
        count = tl.minimum(tl.load(keys_ptr + batch_index), k_len).to(tl.int32)
    if KEYS == "mask":
        keys_ptr += batch_index * key_mask_stride
    # The places of queries, and not the rows of a bias, may count from the last key back.
    first = past if LATE else 0
    row = query + first
    if BIAS != "none":
        bias_ptr += batch_index * bias_batch + head.to(tl.int64) * bias_head - first * bias_q
    split, splits = tl.program_id(0), tl.num_programs(0)
    if split == splits - 1:
        store_few_rows(
            q_len, past, dim, dim_ok, k_ptr, k_row, v_ptr, v_row, head_ptr, k_blocks, v_blocks,
            block_len,
        )  # fmt: skip
    old_first, olds, new_first, news = find_tiles(first, q_len, past, count, K_TILE)
    steps = olds + news
    most, share_of_most, nothing = begin_sums(sinks_ptr, head, row_ok, Q_TILE)
    largest, total, values = attend_in_blocks(
        q, row, row_ok, dim, dim_ok, split * steps // splits, (split + 1) * steps // splits,
        old_first, olds, new_first, past, k_ptr, k_row, v_ptr, v_row, head_ptr, k_blocks, v_blocks,
        block_len, keys_ptr, bias_ptr, bias_q, bias_k, k_len, count, most, share_of_most, nothing,
        K_TILE,
    )  # fmt: skip
    if SPLIT:
        size = tl.num_programs(0) * (ROWS * (DEPTH + 2))
        parts = partial_ptr + pair.to(tl.int64) * size
        turn = leave_sums(values, largest, total, parts, place, dim, turns_ptr, pair)
        if turn == tl.num_programs(0) - 1:
            tl.store(turns_ptr + pair, 0)
            all_values, all_total = add_sums(parts)
            quotient = divide_in_blocks(
                all_values, all_total, v_ptr, v_row, head_ptr, v_blocks, block_len, dim, dim_ok,
                q_len, k_len, K_TILE,
            )  # fmt: skip
            store_rest(quotient, kv_head, q_len, dim, dim_ok, out_ptr, out_head, out_row)
    else:
        quotient = divide_in_blocks(
            values, total, v_ptr, v_row, head_ptr, v_blocks, block_len, dim, dim_ok, q_len, k_len,
            K_TILE,
        )  # fmt: skip
        out_at = out_ptr + head.to(tl.int64) * out_head + query * out_row + dim
        tl.store(out_at, quotient.to(STORED), mask=row_ok & dim_ok)
