# fused_sigmoid_mul
#   computes triton/test_golden.py:LINE: sigmoid, mul, mul
#   reads  x: float32[batch, seq, 2048]
#   writes mul: float32[batch, seq, 1024]
#   rows batch*seq, by columns 1024, in tiles of 1 x 1024, 4 warps
import triton
import triton.language as tl


@triton.jit
def fused_sigmoid_mul(
    x_ptr,
    mul_ptr,
    batch,
    seq,
    COLS: tl.constexpr,
):
    row = tl.program_id(0)
    col = tl.arange(0, COLS)
    x = tl.load(x_ptr + row * 2048 + col)
    x1 = tl.load(x_ptr + row * 2048 + col + 1024)
    tl.store(mul_ptr + row * 1024 + col, x * tl.sigmoid(x) * x1)
