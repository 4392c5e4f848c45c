# fused_add_layer_norm
#   computes triton/test_golden.py:LINE: add, add, layer_norm
#   reads  x: float32[batch, seq, 384]
#   reads  bias: float32[384]
#   reads  y: float32[batch, seq, 384]
#   reads  weight: float32[384]
#   writes layer_norm: float32[batch, seq, 384]
#   rows batch*seq, reduced over columns 384, in tiles of 1 x 512, 4 warps
import triton
import triton.language as tl


@triton.jit
def fused_add_layer_norm(
    x_ptr,
    bias_ptr,
    y_ptr,
    weight_ptr,
    layer_norm_ptr,
    batch,
    seq,
    COLS: tl.constexpr,
):
    row = tl.program_id(0)
    col = tl.arange(0, COLS)
    col_ok = col < 384
    x = tl.load(x_ptr + row * 384 + col, mask=col_ok, other=0)
    bias = tl.load(bias_ptr + col, mask=col_ok, other=0)
    y = tl.load(y_ptr + row * 384 + col, mask=col_ok, other=0)
    add1 = x + bias + y
    weight = tl.load(weight_ptr + col, mask=col_ok)
    # mean, m2 over col, of the row in registers
    mean_share = 1.0 / (384)
    mean = tl.sum(add1 * mean_share, 0)
    mean_off = tl.where(col_ok, add1 - mean, 0.0)
    mean_low = tl.sum(mean_off * mean_share, 0)
    mean_off = tl.where(col_ok, mean_off - mean_low, 0.0)
    m2 = tl.sum(mean_off * mean_off, 0)
    mean += mean_low
    mul1 = (add1 - mean) * tl.rsqrt(m2 / 384.0 + 1e-05) * weight
    tl.store(layer_norm_ptr + row * 384 + col, mul1, mask=col_ok)
