"""Attention's two matrix products: batched GEMMs over strided operands, one program a tile of out.

scores: out = a b^T in float32, b (k_len, HEAD_DIM)    values: out = a b, b (k_len, HEAD_DIM)
"""

import triton
import triton.language as tl

SCORES = tl.constexpr(None)  # which of the two
HEAD_DIM = tl.constexpr(None)
STORED = tl.constexpr(None)  # the dtype of out
PRECISION = tl.constexpr(None)  # "ieee" for float32, or None


@triton.jit
def product(
    a_ptr, b_ptr, out_ptr, batch, heads, kv_heads, q_len, k_len, a_batch, a_head, a_row,
    b_batch, b_head, b_row, out_batch, out_head, out_row,
    M_TILE: tl.constexpr, N_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    width = k_len if SCORES else HEAD_DIM
    length = HEAD_DIM if SCORES else k_len
    m_tiles = tl.cdiv(q_len, M_TILE)
    n_tiles = tl.cdiv(width, N_TILE)
    tile = tl.program_id(0) % (m_tiles * n_tiles)
    sequence_head = tl.program_id(0) // (m_tiles * n_tiles)
    batch_index = (sequence_head // heads).to(tl.int64)
    head = (sequence_head % heads).to(tl.int64)
    kv_head = head // (heads // kv_heads)
    m = tile // n_tiles * M_TILE + tl.arange(0, M_TILE)[:, None]
    n = tile % n_tiles * N_TILE + tl.arange(0, N_TILE)[None, :]
    m_ok = m < q_len
    n_ok = n < width
    if SCORES:
        n_row = tile % n_tiles * N_TILE + tl.arange(0, N_TILE)[:, None]
        n_row_ok = n_row < k_len
    a_ptr += batch_index * a_batch + head * a_head
    b_ptr += batch_index * b_batch + kv_head * b_head
    sums = tl.zeros((M_TILE, N_TILE), tl.float32)
    for start in range(0, length, K_TILE):
        k_col = start + tl.arange(0, K_TILE)[None, :]
        k_ok = k_col < length
        a = tl.load(a_ptr + m.to(tl.int64) * a_row + k_col, mask=m_ok & k_ok, other=0.0)
        if SCORES:
            b_at = b_ptr + n_row.to(tl.int64) * b_row + k_col
            b = tl.trans(tl.load(b_at, mask=n_row_ok & k_ok, other=0.0))
        else:
            k_row = start + tl.arange(0, K_TILE)[:, None]
            b_at = b_ptr + k_row.to(tl.int64) * b_row + n
            b = tl.load(b_at, mask=(k_row < k_len) & n_ok, other=0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    out_ptr += batch_index * out_batch + head * out_head
    tl.store(out_ptr + m.to(tl.int64) * out_row + n, sums.to(STORED), mask=m_ok & n_ok)
