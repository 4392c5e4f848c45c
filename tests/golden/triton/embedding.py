# fused_embedding_mul
#   computes triton/test_golden.py:LINE: embedding, mul
#   reads  ids: int64[batch, seq]
#   reads  table: float32[table_d0, table_d1]
#   writes mul: float32[batch, seq, table_d1]
#   rows batch*seq, by columns table_d1, in tiles of 4 x 256, 4 warps
import triton
import triton.language as tl


@triton.jit
def fused_embedding_mul(
    ids_ptr,
    table_ptr,
    mul_ptr,
    status_ptr,
    batch,
    seq,
    table_d0,
    table_d1,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row_ok = row < batch * seq
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    col_ok = col < table_d1
    ids = tl.load(ids_ptr + row, mask=row_ok)
    ids_ok = (ids >= 0) & (ids < table_d0)
    tl.store(status_ptr + tl.zeros_like(ids), 1, mask=~ids_ok & row_ok)
    table = tl.load(table_ptr + ids * table_d1 + col, mask=row_ok & col_ok & ids_ok, other=0)
    tl.store(mul_ptr + row * table_d1 + col, table * 16.0, mask=row_ok & col_ok)
