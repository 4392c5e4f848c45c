# fused_sum
#   computes triton/test_golden.py:LINE: sum
#   reads  x: float32[batch, seq]
#   writes sum: float32[seq]
#   rows seq, reduced over columns batch, in turns of 32, 4 warps
import triton
import triton.language as tl


@triton.jit
def fused_sum(
    x_ptr,
    sum_ptr,
    batch,
    seq,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row_ok = row < seq
    # sum_ over col
    sum_so_far = tl.full((ROWS, COLS), 0.0, tl.float32)
    for start in range(0, batch, COLS):
        col = start + tl.arange(0, COLS)[None, :]
        col_ok = col < batch
        x = tl.load(x_ptr + row + col * seq, mask=row_ok & col_ok)
        sum_so_far += tl.where(col_ok, x, 0.0)
    sum_ = tl.sum(sum_so_far, 1, keep_dims=True)
    tl.store(sum_ptr + row, sum_, mask=row_ok)
