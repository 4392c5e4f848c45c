# fused_softmax
#   computes triton/test_golden.py:LINE: softmax
#   reads  x: float32[batch, seq]
#   writes softmax: float32[batch, seq]
#   rows batch, reduced over columns seq, in turns of 4096, 8 warps
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
    # largest, total over col in one pass
    largest_so_far = tl.full((COLS,), float("-inf"), tl.float32)
    total_so_far = tl.full((COLS,), 0.0, tl.float32)
    for start in range(0, seq, COLS):
        col = start + tl.arange(0, COLS)
        col_ok = col < seq
        x = tl.load(x_ptr + row * seq + col, mask=col_ok)
        largest_so_far, total_so_far = combine(
            largest_so_far,
            total_so_far,
            tl.where(col_ok, x, float("-inf")),
            tl.where(col_ok, tl.where(x == float("inf"), float("nan"), 1.0), 0.0),
        )
    largest, total = tl.reduce((largest_so_far, total_so_far), 0, combine)
    for start in range(0, seq, COLS):
        col = start + tl.arange(0, COLS)
        col_ok = col < seq
        x = tl.load(x_ptr + row * seq + col, mask=col_ok)
        tl.store(softmax_ptr + row * seq + col, tl.exp(x - largest) * (1.0 / total), mask=col_ok)
