"""Attention over a decoder's cache: keys and values in blocks given by a table, and new rows.

Old rows are read from the cache, new rows from their own tensors, so that a launch that also
appends them does not wait for its stores. A tile of keys is within one block.
"""

import triton
import triton.language as tl

from turbotx.kernels.triton.templates.attention_tile import divide, find_keys, score_keys

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
MOST_DEEP = tl.constexpr(None)

LOG2E = tl.constexpr(1.4426950408889634)
MOST = tl.constexpr(3.4028234663852886e38)  # of float32


@triton.jit
def find_cache(kv_head, batch_index, cache_ptr, k_table_ptr, v_table_ptr, columns, block_len):
    """Where a head lies in any block, and the tables of its sequence."""
    head_ptr = cache_ptr + kv_head.to(tl.int64) * (block_len * HEAD_DIM)
    k_blocks = k_table_ptr + batch_index * columns
    v_blocks = v_table_ptr + batch_index * columns
    return head_ptr, k_blocks, v_blocks


@triton.jit
def store_rows(
    row, row_ok, past, dim, dim_ok, k_ptr, k_row, v_ptr, v_row, cache_ptr, k_table_ptr,
    v_table_ptr, block_len,
):  # fmt: skip
    position = past + row
    block = position // block_len
    inner = (position - block * block_len) * HEAD_DIM + dim
    k_place = tl.load(k_table_ptr + block, mask=row_ok, other=0)
    v_place = tl.load(v_table_ptr + block, mask=row_ok, other=0)
    new_k = tl.load(k_ptr + row.to(tl.int64) * k_row + dim, mask=row_ok & dim_ok)
    new_v = tl.load(v_ptr + row.to(tl.int64) * v_row + dim, mask=row_ok & dim_ok)
    tl.store(cache_ptr + tl.multiple_of(k_place, [1, 16]) + inner, new_k, mask=row_ok & dim_ok)
    tl.store(cache_ptr + tl.multiple_of(v_place, [1, 16]) + inner, new_v, mask=row_ok & dim_ok)


@triton.jit
def find_tiles(first, q_rows, past, count, K_TILE: tl.constexpr):
    """The tiles that any of some queries sees: of what was there before, then of new rows."""
    low = 0
    high = count
    if LEFT is not None:
        low = tl.maximum(first - LEFT, 0)
    if RIGHT is not None:
        high = tl.minimum(count, first + q_rows + RIGHT)
    old_first = low // K_TILE
    olds = tl.maximum(tl.cdiv(tl.minimum(high, past), K_TILE) - old_first, 0)
    new_first = tl.maximum(low - past, 0) // K_TILE
    news = tl.maximum(tl.cdiv(tl.maximum(high - past, 0), K_TILE) - new_first, 0)
    return old_first, olds, new_first, news


@triton.jit
def find_tile(step, old_first, olds, new_first, past, count, K_TILE: tl.constexpr):
    """Where a tile begins, and the key that ends it."""
    is_new = step >= olds
    tile = tl.where(is_new, new_first + step - olds, old_first + step)
    start = tl.where(is_new, past, 0) + tile * K_TILE
    limit = tl.where(is_new, count, tl.minimum(count, past))
    return is_new, start, limit


@triton.jit
def find_rows(is_new, start, past, new_ptr, new_row, cache_ptr, table_ptr, block_len):
    """Where the rows of a tile begin, and the step from one to the next."""
    column = start // block_len
    place = tl.load(table_ptr + column) + (start - column * block_len) * HEAD_DIM
    held_ptr = cache_ptr + tl.multiple_of(place, 16)
    rows_ptr = tl.where(is_new, new_ptr + (start - past).to(tl.int64) * new_row, held_ptr)
    step_of_rows = tl.where(is_new, new_row, HEAD_DIM)
    return rows_ptr, step_of_rows


@triton.jit
def attend_in_blocks(
    q, row, row_ok, dim, dim_ok, begin, end, old_first, olds, new_first, past, k_ptr, k_row, v_ptr,
    v_row, cache_ptr, k_table_ptr, v_table_ptr, block_len, keys_ptr, bias_ptr, bias_q, bias_k,
    k_len, count, most, share_of_most, sums, K_TILE: tl.constexpr,
):  # fmt: skip
    largest = most
    total = share_of_most
    values = sums
    for step in range(begin, end):
        is_new, start, limit = find_tile(step, old_first, olds, new_first, past, count, K_TILE)
        col, key, key_ok, mask = find_keys(start, keys_ptr, k_len, limit, K_TILE)
        place = tl.arange(0, K_TILE)[:, None]
        k_rows, k_step = find_rows(
            is_new, start, past, k_ptr, k_row, cache_ptr, k_table_ptr, block_len
        )
        k = tl.load(k_rows + place * k_step + dim, mask=key_ok & dim_ok, other=0.0)
        # Behind one another, and before anything waits for either.
        v_rows, v_step = find_rows(
            is_new, start, past, v_ptr, v_row, cache_ptr, v_table_ptr, block_len
        )
        v = tl.load(v_rows + place * v_step + dim, mask=key_ok & dim_ok, other=0.0)
        scores = score_keys(q, k, mask, row, row_ok, col, limit, bias_ptr, bias_q, bias_k)
        larger = tl.maximum(largest, tl.max(scores, 1, keep_dims=True))
        # A query that has seen no key yet has no largest score to subtract.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        share = tl.exp2(scores - shift)
        fade = tl.exp2(largest - shift)
        total = total * fade + tl.sum(share, 1, keep_dims=True)
        values = values * fade + tl.dot(share.to(STORED), v, input_precision=PRECISION)
        largest = larger
    return largest, total, values


@triton.jit
def average_in_blocks(
    v_ptr, v_row, cache_ptr, v_table_ptr, block_len, dim, dim_ok, q_len, k_len,
    K_TILE: tl.constexpr,
):  # fmt: skip
    past = k_len - q_len
    olds = tl.cdiv(past, K_TILE)
    sums = tl.zeros((1, DEPTH), tl.float32)
    for step in range(olds + tl.cdiv(q_len, K_TILE)):
        is_new, start, limit = find_tile(step, 0, olds, 0, past, k_len, K_TILE)
        key = tl.arange(0, K_TILE)[:, None]
        rows, step_of_rows = find_rows(
            is_new, start, past, v_ptr, v_row, cache_ptr, v_table_ptr, block_len
        )
        inside = (start + key < limit) & dim_ok
        v = tl.load(rows + key.to(tl.int64) * step_of_rows + dim, mask=inside, other=0.0)
        sums += tl.sum(v.to(tl.float32), 0, keep_dims=True)
    return sums / tl.maximum(k_len, 1)


@triton.jit
def divide_in_blocks(
    values, total, v_ptr, v_row, cache_ptr, v_table_ptr, block_len, dim, dim_ok, q_len, k_len,
    K_TILE: tl.constexpr,
):  # fmt: skip
    if BLIND_MEAN:
        blind = total == 0.0
        if tl.max(blind.to(tl.int32)) > 0:
            mean = average_in_blocks(
                v_ptr, v_row, cache_ptr, v_table_ptr, block_len, dim, dim_ok, q_len, k_len, K_TILE
            )
            values = tl.where(blind, mean, values)
    quotient = divide(values, total, k_len)
    return quotient


@triton.jit
def begin_with_sink(sinks_ptr, head, Q_TILE: tl.constexpr):
    if SINKS:
        most = tl.zeros((Q_TILE, 1), tl.float32) + tl.load(sinks_ptr + head) * LOG2E
        share_of_most = tl.where(most == float("-inf"), 0.0, 1.0)
    else:
        most = tl.full((Q_TILE, 1), float("-inf"), tl.float32)
        share_of_most = tl.zeros((Q_TILE, 1), tl.float32)
    nothing = tl.zeros((Q_TILE, DEPTH), tl.float32)
    return most, share_of_most, nothing


@triton.jit
def cached_attention(
    q_ptr, k_ptr, v_ptr, out_ptr, keys_ptr, bias_ptr, sinks_ptr, cache_ptr, k_table_ptr,
    v_table_ptr, batch, heads, kv_heads, q_len, k_len, q_batch, q_head, q_row, k_batch, k_head,
    k_row, v_batch, v_head, v_row, out_batch, out_head, out_row, key_mask_stride, bias_batch,
    bias_head, bias_q, bias_k, columns, block_len, Q_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    batch_index = tl.program_id(2)
    if batch >= MOST_DEEP:  # the others are along the first axis
        tiles = tl.cdiv(q_len, Q_TILE)
        batch_index += tile // tiles * tl.num_programs(2)
        tile = tl.where(batch_index < batch, tile % tiles, tiles)
        batch_index = tl.minimum(batch_index, batch - 1)
    batch_index = batch_index.to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    group = heads // kv_heads
    kv_head = head // group
    place = tile * Q_TILE + tl.arange(0, Q_TILE)[:, None]
    dim = tl.arange(0, DEPTH)[None, :]
    row_ok = place < q_len
    dim_ok = dim < HEAD_DIM if DEPTH != HEAD_DIM else True
    q_ptr += batch_index * q_batch + head * q_head
    k_ptr += batch_index * k_batch + kv_head * k_head
    v_ptr += batch_index * v_batch + kv_head * v_head
    q = tl.load(q_ptr + place.to(tl.int64) * q_row + dim, mask=row_ok & dim_ok, other=0.0)
    past = k_len - q_len
    head_ptr, k_blocks, v_blocks = find_cache(
        kv_head, batch_index, cache_ptr, k_table_ptr, v_table_ptr, columns, block_len
    )
    if head % group == 0:  # the first head of queries that shares these keys
        store_rows(
            place, row_ok, past, dim, dim_ok, k_ptr, k_row, v_ptr, v_row, head_ptr, k_blocks,
            v_blocks, block_len,
        )  # fmt: skip
    count = k_len
    if KEYS == "lengths":
        count = tl.minimum(tl.load(keys_ptr + batch_index), k_len).to(tl.int32)
    if KEYS == "mask":
        keys_ptr += batch_index * key_mask_stride
    # Places of queries, and not the rows of a bias, may count from the last key back.
    late = past if LATE else 0
    row = place + late
    if BIAS != "none":
        bias_ptr += batch_index * bias_batch + head * bias_head - late * bias_q
    old_first, olds, new_first, news = find_tiles(tile * Q_TILE + late, Q_TILE, past, count, K_TILE)
    most, share_of_most, nothing = begin_with_sink(sinks_ptr, head, Q_TILE)
    largest, total, values = attend_in_blocks(
        q, row, row_ok, dim, dim_ok, 0, olds + news, old_first, olds, new_first, past, k_ptr, k_row,
        v_ptr, v_row, head_ptr, k_blocks, v_blocks, block_len, keys_ptr, bias_ptr, bias_q, bias_k,
        k_len, count, most, share_of_most, nothing, K_TILE,
    )  # fmt: skip
    out = divide_in_blocks(
        values, total, v_ptr, v_row, head_ptr, v_blocks, block_len, dim, dim_ok, q_len, k_len,
        K_TILE,
    )  # fmt: skip
    out_ptr += batch_index * out_batch + head * out_head
    out_at = out_ptr + place.to(tl.int64) * out_row + dim
    tl.store(out_at, out.to(STORED), mask=row_ok & dim_ok)
