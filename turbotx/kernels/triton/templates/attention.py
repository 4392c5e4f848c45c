"""Flash attention: softmax(q k^T) v over strided operands, scores never in memory.

One program a tile of queries. Online softmax after Milakov & Gimelshein 2018, tiling after Dao et
al. 2022 (FlashAttention). Where all keys are in one tile there is no loop, and nothing to carry
through one.
"""

import triton
import triton.language as tl

from turbotx.kernels.triton.templates.attention_tile import divide, find_keys, score_keys
from turbotx.kernels.triton.templates.peaks import leave_peaks

HEAD_DIM = tl.constexpr(None)
DEPTH = tl.constexpr(None)  # HEAD_DIM rounded up to a power of two
STORED = tl.constexpr(None)  # the dtype of q, k, v and out
PRECISION = tl.constexpr(None)  # "ieee" for float32, or None
SCALE = tl.constexpr(None)  # of scores
CAP = tl.constexpr(None)  # soft cap of scores by tanh, before the bias; 0.0: none
KEYS = tl.constexpr(None)  # visible keys: "all", or by a "mask" (batch, k_len) or "lengths"
BIAS = tl.constexpr(None)  # "none", "boolean", or otherwise floats
LEFT = tl.constexpr(None)  # sliding window to the left of a query, None: unlimited
RIGHT = tl.constexpr(None)  # to the right
LATE = tl.constexpr(None)  # whether the last query is aligned with the last key
BLIND_NAN = tl.constexpr(None)  # fully masked queries get NaN instead of zeros,
BLIND_MEAN = tl.constexpr(None)  # or the mean of all values
SINKS = tl.constexpr(None)  # attention sinks: an extra score per head without a value
ONCE = tl.constexpr(None)  # whether one tile holds all keys
PEAKS = tl.constexpr(None)  # whether to store the largest magnitude of each row, per head
PACKED = tl.constexpr(None)  # whether sequences are concatenated, given by bounds
# Sequences are along a grid's third axis, which has room for as many: no division then finds a
# program's place, which would take longer than all else before its first load.
MOST_DEEP = tl.constexpr(None)

# Exponentials are powers of two, which GPUs have an instruction for.
LOG2E = tl.constexpr(1.4426950408889634)
MOST = tl.constexpr(3.4028234663852886e38)  # of float32
SEARCHED = tl.constexpr(128)  # bounds that a program searches at once


@triton.jit
def find_sequence(tile, bounds_ptr, batch, Q_TILE: tl.constexpr):
    # Sequence n has the tiles from bounds[n] // Q_TILE + n on: as many as it needs or one more.
    sequence = -1
    for bound_start in range(0, batch, SEARCHED):
        place = bound_start + tl.arange(0, SEARCHED)
        bound = tl.load(bounds_ptr + place, mask=place < batch, other=0).to(tl.int32)
        before = (place < batch) & (bound // Q_TILE + place <= tile)
        sequence += tl.sum(before.to(tl.int32), 0)
    begin = tl.load(bounds_ptr + sequence)
    length = (tl.load(bounds_ptr + sequence + 1) - begin).to(tl.int32)
    own_tile = tile - (begin.to(tl.int32) // Q_TILE + sequence)
    # A tile that its sequence does not need sees no keys, and stores nothing.
    seen = tl.where(own_tile * Q_TILE < length, length, 0)
    return sequence, begin, length, seen, own_tile


@triton.jit
def attend_at_once(
    q, row, row_ok, dim, dim_ok, k_ptr, k_row, v_ptr, v_row, keys_ptr, bias_ptr, bias_q, bias_k,
    sink_ptr, k_len, count, K_TILE: tl.constexpr,
):  # fmt: skip
    col, key, key_ok, mask = find_keys(0, keys_ptr, k_len, count, K_TILE)
    k = tl.load(k_ptr + key.to(tl.int64) * k_row + dim, mask=key_ok & dim_ok, other=0.0)
    v = tl.load(v_ptr + key.to(tl.int64) * v_row + dim, mask=key_ok & dim_ok, other=0.0)
    scores = score_keys(q, k, mask, row, row_ok, col, count, bias_ptr, bias_q, bias_k)
    largest = tl.max(scores, 1, keep_dims=True)
    if SINKS:
        sink = tl.load(sink_ptr) * LOG2E
        largest = tl.maximum(largest, sink)
    # A query that sees no key has no largest score to subtract.
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    share = tl.exp2(scores - shift)
    total = tl.sum(share, 1, keep_dims=True)
    if SINKS:
        total += tl.exp2(sink - shift)
    values = tl.dot(share.to(STORED), v, input_precision=PRECISION)
    return values, total


@triton.jit
def attend_in_tiles(
    q, first, row, row_ok, dim, dim_ok, k_ptr, k_row, v_ptr, v_row, keys_ptr, bias_ptr, bias_q,
    bias_k, sink_ptr, k_len, count, Q_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    # For each query: the largest score so far, the sum of exponentials, of values.
    if SINKS:
        largest = tl.zeros((Q_TILE, 1), tl.float32) + tl.load(sink_ptr) * LOG2E
        total = tl.where(largest == float("-inf"), 0.0, 1.0)
    else:
        largest = tl.full((Q_TILE, 1), float("-inf"), tl.float32)
        total = tl.zeros((Q_TILE, 1), tl.float32)
    values = tl.zeros((Q_TILE, DEPTH), tl.float32)
    if LEFT is not None or RIGHT is not None:
        # Keys that no query of this tile sees are not visited.
        begin = tl.maximum(first - LEFT, 0) // K_TILE * K_TILE if LEFT is not None else 0
        end = tl.minimum(count, first + Q_TILE + RIGHT) if RIGHT is not None else count
    else:
        begin = 0
        end = count
    for start in range(begin, end, K_TILE):
        col, key, key_ok, mask = find_keys(start, keys_ptr, k_len, count, K_TILE)
        k = tl.load(k_ptr + key.to(tl.int64) * k_row + dim, mask=key_ok & dim_ok, other=0.0)
        scores = score_keys(q, k, mask, row, row_ok, col, count, bias_ptr, bias_q, bias_k)
        larger = tl.maximum(largest, tl.max(scores, 1, keep_dims=True))
        # A query that has seen no key yet has no largest score to subtract.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        share = tl.exp2(scores - shift)
        fade = tl.exp2(largest - shift)
        total = total * fade + tl.sum(share, 1, keep_dims=True)
        v = tl.load(v_ptr + key.to(tl.int64) * v_row + dim, mask=key_ok & dim_ok, other=0.0)
        values = values * fade + tl.dot(share.to(STORED), v, input_precision=PRECISION)
        largest = larger
    return values, total


@triton.jit
def average_values(v_ptr, v_row, dim, dim_ok, k_len, K_TILE: tl.constexpr):
    sums = tl.zeros((1, DEPTH), tl.float32)
    for start in range(0, k_len, K_TILE):
        key = start + tl.arange(0, K_TILE)[:, None]
        v_at = v_ptr + key.to(tl.int64) * v_row + dim
        v = tl.load(v_at, mask=(key < k_len) & dim_ok, other=0.0)
        sums += tl.sum(v.to(tl.float32), 0, keep_dims=True)
    return sums / tl.maximum(k_len, 1)


@triton.jit
def divide_values(values, total, v_ptr, v_row, dim, dim_ok, k_len, K_TILE: tl.constexpr):
    if BLIND_MEAN:
        blind = total == 0.0
        if tl.max(blind.to(tl.int32)) > 0:
            mean = average_values(v_ptr, v_row, dim, dim_ok, k_len, K_TILE)
            values = tl.where(blind, mean, values)
    quotient = divide(values, total, k_len)
    return quotient


@triton.jit
def store_rows(
    values, out_ptr, out_row, peaks_ptr, before, row, row_ok, dim, dim_ok, head, heads
):  # fmt: skip
    out_at = out_ptr + row.to(tl.int64) * out_row + dim
    tl.store(out_at, values.to(STORED), mask=row_ok & dim_ok)
    if PEAKS:
        leave_peaks(values.to(STORED), peaks_ptr, before + row, row_ok, dim_ok, head, heads, False)


@triton.jit
def attention(
    q_ptr, k_ptr, v_ptr, out_ptr, keys_ptr, bias_ptr, sinks_ptr, bounds_ptr, starts_ptr, peaks_ptr,
    batch, heads, kv_heads, q_len, k_len, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch,
    v_head, v_row, out_batch, out_head, out_row, key_mask_stride, bias_batch, bias_head, bias_q,
    bias_k, Q_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = tl.program_id(1)
    batch_index = tl.program_id(2)
    if PACKED:
        sequence, begin, q_len, k_len, tile = find_sequence(tile, bounds_ptr, batch, Q_TILE)
        q_ptr, out_ptr = q_ptr + begin * q_row, out_ptr + begin * out_row
        k_ptr, v_ptr = k_ptr + begin * k_row, v_ptr + begin * v_row
        if KEYS == "mask":
            keys_ptr += begin
        if BIAS != "none":
            bias_ptr += tl.load(starts_ptr + sequence) * (bias_q + bias_k)
    elif batch >= MOST_DEEP:  # the others are along the first axis
        tiles = tl.cdiv(q_len, Q_TILE)
        batch_index += tile // tiles * tl.num_programs(2)
        tile = tile % tiles
        q_len = tl.where(batch_index < batch, q_len, 0)
        batch_index = tl.minimum(batch_index, batch - 1)
    kv_head = head
    if kv_heads != heads:
        kv_head = head // (heads // kv_heads)
    batch_index = batch_index.to(tl.int64)
    head = head.to(tl.int64)
    kv_head = kv_head.to(tl.int64)
    first = tile * Q_TILE
    row = first + tl.arange(0, Q_TILE)[:, None]
    dim = tl.arange(0, DEPTH)[None, :]
    row_ok = row < q_len
    dim_ok = dim < HEAD_DIM if DEPTH != HEAD_DIM else True
    q_ptr += batch_index * q_batch + head * q_head
    k_ptr += batch_index * k_batch + kv_head * k_head
    v_ptr += batch_index * v_batch + kv_head * v_head
    q = tl.load(q_ptr + row.to(tl.int64) * q_row + dim, mask=row_ok & dim_ok, other=0.0)
    count = k_len
    if KEYS == "lengths":
        count = tl.minimum(tl.load(keys_ptr + batch_index), k_len).to(tl.int32)
    if KEYS == "mask":
        keys_ptr += batch_index * key_mask_stride
    if BIAS != "none":
        bias_ptr += batch_index * bias_batch + head * bias_head
    if SINKS:
        sinks_ptr += head
    if LATE:
        # Places of queries, and not the rows of a bias, count from the last key back.
        first += k_len - q_len
        row += k_len - q_len
        if BIAS != "none":
            bias_ptr -= (k_len - q_len) * bias_q
    if ONCE:
        values, total = attend_at_once(
            q, row, row_ok, dim, dim_ok, k_ptr, k_row, v_ptr, v_row,
            keys_ptr, bias_ptr, bias_q, bias_k, sinks_ptr, k_len, count, K_TILE,
        )  # fmt: skip
    else:
        values, total = attend_in_tiles(
            q, first, row, row_ok, dim, dim_ok, k_ptr, k_row, v_ptr, v_row,
            keys_ptr, bias_ptr, bias_q, bias_k, sinks_ptr, k_len, count, Q_TILE, K_TILE,
        )  # fmt: skip
    if LATE:
        row -= k_len - q_len
    values = divide_values(values, total, v_ptr, v_row, dim, dim_ok, k_len, K_TILE)
    out_ptr += batch_index * out_batch + head * out_head
    store_rows(values, out_ptr, out_row, peaks_ptr, begin if PACKED else batch_index * q_len, row,
               row_ok, dim, dim_ok, head, heads)  # fmt: skip
