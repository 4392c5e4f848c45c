# fused_softmax
#   computes triton/test_golden.py:LINE: softmax
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
    # largest, total over col, of the row in registers
    x = tl.where(col_ok, x, float("-inf"))
    largest = tl.reduce(x, 0, maximum)
    total = tl.sum(tl.exp(x - largest), 0)
    total = tl.where(largest == float("-inf"), 0.0, total)
    tl.store(softmax_ptr + row * seq + col, tl.exp(x - largest) * (1.0 / total), mask=col_ok)
