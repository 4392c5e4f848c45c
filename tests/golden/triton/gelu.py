# fused_add_gelu
#   computes triton/test_golden.py:LINE: add, gelu
#   reads  x: float32[batch, seq, x_d2]
#   reads  b: float32[x_d2]
#   writes gelu: float32[batch, seq, x_d2]
#   rows batch*seq, by columns x_d2, in tiles of 4 x 256, 4 warps
import triton
import triton.language as tl


@triton.jit
def fused_add_gelu(
    x_ptr,
    b_ptr,
    gelu_ptr,
    batch,
    seq,
    x_d2,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row_ok = row < batch * seq
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    col_ok = col < x_d2
    x = tl.load(x_ptr + row * x_d2 + col, mask=row_ok & col_ok)
    b = tl.load(b_ptr + col, mask=col_ok)
    add = x + b
    mul2 = 0.5 * add * (1.0 + tl.erf(add * 0.7071067811865476))
    tl.store(gelu_ptr + row * x_d2 + col, mul2, mask=row_ok & col_ok)
