# fused_mul
#   computes triton/test_golden.py:LINE: mul
#   reads  x: float32[batch, x_d1, x_d2, x_d3]
#   writes mul: float32[batch, x_d2, x_d1, x_d3]
#   rows batch x x_d2 x x_d1, by columns x_d3, in tiles of 4 x 256, 4 warps
import triton
import triton.language as tl


@triton.jit
def fused_mul(
    x_ptr,
    mul_ptr,
    batch,
    x_d1,
    x_d2,
    x_d3,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row = index % x_d1
    row1 = index // x_d1 % x_d2
    row2 = index // (x_d1 * x_d2)
    row_ok = index < batch * x_d1 * x_d2
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    col_ok = col < x_d3
    x = tl.load(
        x_ptr + row2 * x_d1 * x_d2 * x_d3 + row * x_d2 * x_d3 + row1 * x_d3 + col,
        mask=row_ok & col_ok,
    )
    tl.store(
        mul_ptr + row2 * x_d1 * x_d2 * x_d3 + row1 * x_d1 * x_d3 + row * x_d3 + col,
        x * 0.125,
        mask=row_ok & col_ok,
    )
