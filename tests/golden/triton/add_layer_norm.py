# fused_add_layer_norm
#   computes add, add, layer_norm
#   reads  x: float32[batch, seq, 384]
#   reads  bias: float32[384]
#   reads  y: float32[batch, seq, 384]
#   reads  weight: float32[384]
#   writes layer_norm: float32[batch, seq, 384]
#   rows batch*seq, reduced over columns 384, in tiles of 1 x 512, 4 warps
import triton
import triton.language as tl


@triton.jit
def combine(mean_a, m2_a, low_a, count_a, mean_b, m2_b, low_b, count_b):
    count = count_a + count_b
    share = count_b / tl.maximum(count, 1.0)  # of nothing and nothing: 0
    delta = mean_b - mean_a
    below = low_b - low_a
    step = delta * share
    mean = mean_a + step
    low = low_a + below * share + (step - (mean - mean_a))
    delta += below
    m2 = m2_a + m2_b + delta * delta * count_a * share
    return mean, m2, low, count


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
    x = tl.load(x_ptr + row * 384 + col, mask=col_ok)
    bias = tl.load(bias_ptr + col, mask=col_ok)
    y = tl.load(y_ptr + row * 384 + col, mask=col_ok)
    add1 = x + bias + y
    weight = tl.load(weight_ptr + col, mask=col_ok)
    # mean, m2 over col in one pass
    mean, m2, mean_low, mean_count = tl.reduce(
        (
            tl.where(col_ok, add1, 0.0),
            tl.zeros_like(add1),
            tl.zeros_like(add1),
            tl.where(col_ok, tl.zeros_like(add1) + 1.0, 0.0),
        ),
        0,
        combine,
    )
    mean += mean_low
    mul1 = (add1 - mean) * tl.rsqrt(m2 / 384.0 + 1e-05) * weight
    tl.store(layer_norm_ptr + row * 384 + col, mul1, mask=col_ok)
