# attention_scores_f16_64
#   out = a b^T in float32 for every head, head_dim 64
#   tiles of 64 x 64, 64 at a time, 4 warps
import triton
import triton.language as tl


@triton.jit
def attention_scores_f16_64(
    a_ptr,
    b_ptr,
    out_ptr,
    batch,
    heads,
    kv_heads,
    q_len,
    k_len,
    a_batch,
    a_head,
    a_row,
    b_batch,
    b_head,
    b_row,
    out_batch,
    out_head,
    out_row,
    M_TILE: tl.constexpr,
    N_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
):
    m_tiles = tl.cdiv(q_len, M_TILE)
    n_tiles = tl.cdiv(k_len, N_TILE)
    tile = tl.program_id(0) % (m_tiles * n_tiles)
    sequence_head = tl.program_id(0) // (m_tiles * n_tiles)
    batch_index = (sequence_head // heads).to(tl.int64)
    head = (sequence_head % heads).to(tl.int64)
    kv_head = head // (heads // kv_heads)
    m = tile // n_tiles * M_TILE + tl.arange(0, M_TILE)[:, None]
    n = tile % n_tiles * N_TILE + tl.arange(0, N_TILE)[None, :]
    m_ok = m < q_len
    n_ok = n < k_len
    n_row = tile % n_tiles * N_TILE + tl.arange(0, N_TILE)[:, None]
    n_row_ok = n_row < k_len
    a_ptr += batch_index * a_batch + head * a_head
    b_ptr += batch_index * b_batch + kv_head * b_head
    sums = tl.zeros((M_TILE, N_TILE), tl.float32)
    for start in range(0, 64, K_TILE):
        k_col = start + tl.arange(0, K_TILE)[None, :]
        k_ok = k_col < 64
        a = tl.load(a_ptr + m.to(tl.int64) * a_row + k_col, mask=m_ok & k_ok, other=0.0)
        b_at = b_ptr + n_row.to(tl.int64) * b_row + k_col
        b = tl.trans(tl.load(b_at, mask=n_row_ok & k_ok, other=0.0))
        sums = tl.dot(a, b, sums)
    out_ptr += batch_index * out_batch + head * out_head
    tl.store(out_ptr + m.to(tl.int64) * out_row + n, sums.to(tl.float32), mask=m_ok & n_ok)
