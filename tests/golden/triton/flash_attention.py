# attention_f16_64_causal_key_mask
#   softmax(q k^T * 0.125) v with head_dim 64, a key mask, causal
#   tiles of 64 queries x 64 keys, 4 warps
import triton
import triton.language as tl


@triton.jit
def attention_f16_64_causal_key_mask(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    keys_ptr,
    batch,
    heads,
    kv_heads,
    q_len,
    k_len,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_batch,
    out_head,
    out_row,
    key_mask_stride,
    bias_batch,
    bias_head,
    bias_q,
    bias_k,
    Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    batch_index = tl.program_id(2)
    if batch >= 65535:  # the others are along the first axis
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
    dim = tl.arange(0, 64)[None, :]
    row_ok = row < q_len
    q_ptr += batch_index * q_batch + head * q_head
    k_ptr += batch_index * k_batch + kv_head * k_head
    v_ptr += batch_index * v_batch + kv_head * v_head
    q = tl.load(q_ptr + row.to(tl.int64) * q_row + dim, mask=row_ok, other=0.0)
    keys_ptr += batch_index * key_mask_stride

    # For each query: the largest score so far, the sum of exponentials, of values.
    largest = tl.full((Q_TILE, 1), float("-inf"), tl.float32)
    total = tl.zeros((Q_TILE, 1), tl.float32)
    values = tl.zeros((Q_TILE, 64), tl.float32)
    # Keys that no query of this tile sees are not visited.
    end = tl.minimum(k_len, first + Q_TILE)
    for start in range(0, end, K_TILE):
        col = start + tl.arange(0, K_TILE)[None, :]
        key = start + tl.arange(0, K_TILE)[:, None]
        key_ok = key < k_len
        # Asked for before the keys, whose way takes as long.
        mask = tl.load(keys_ptr + col, mask=col < k_len, other=0)
        k = tl.load(k_ptr + key.to(tl.int64) * k_row + dim, mask=key_ok, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * 0.18033688011112042
        visible = col < k_len
        visible = visible & (mask != 0)
        visible = visible & (col <= row)
        scores = tl.where(visible, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1, keep_dims=True))
        # A query that has seen no key yet has no largest score to subtract.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        share = tl.exp2(scores - shift)
        fade = tl.exp2(largest - shift)
        total = total * fade + tl.sum(share, 1, keep_dims=True)
        v = tl.load(v_ptr + key.to(tl.int64) * v_row + dim, mask=key_ok, other=0.0)
        values = values * fade + tl.dot(share.to(tl.float16), v)
        largest = larger

    # A query that sees no key gets zeros.
    zeros = total == 0.0
    quotient = values / tl.where(zeros, 1.0, total)
    values = quotient
    out_ptr += batch_index * out_batch + head * out_head
    out_at = out_ptr + row.to(tl.int64) * out_row + dim
    tl.store(out_at, values.to(tl.float16), mask=row_ok)
