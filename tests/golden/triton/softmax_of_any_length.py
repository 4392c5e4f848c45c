# fused_softmax
#   computes softmax
#   reads  x: float32[batch, seq]
#   writes softmax: float32[batch, seq]
#   rows batch, reduced over columns seq, in tiles of 1 x 1024, 4 warps
import triton
import triton.language as tl


@triton.jit
def maximum(a, b):
    """The larger one, NaN where either is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def combine(largest_a, total_a, largest_b, total_b):
    largest = maximum(largest_a, largest_b)
    gap = tl.abs(largest_a - largest_b)
    fade = tl.where(largest_a == largest_b, 1.0, tl.exp(-gap))
    ahead = largest_a > largest_b
    total = total_a * tl.where(ahead, 1.0, fade) + total_b * tl.where(ahead, fade, 1.0)
    return largest, total


@triton.jit
def fused_softmax(
    x_ptr,
    softmax_ptr,
    batch,
    seq,
    COLS: tl.constexpr,
):
    row = tl.program_id(0)
    col = tl.arange(0, COLS)
    col_ok = col < seq
    x = tl.load(x_ptr + row * seq + col, mask=col_ok)
    # largest, total over col in one pass
    largest, total = tl.reduce(
        (
            tl.where(col_ok, x, float("-inf")),
            tl.where(col_ok, tl.where(x == float("inf"), float("nan"), 1.0), 0.0),
        ),
        0,
        combine,
    )
    tl.store(softmax_ptr + row * seq + col, tl.exp(x - largest) / total, mask=col_ok)
