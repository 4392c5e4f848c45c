# fused_logical_not_softmax_full_like_where
#   computes triton/test_golden.py:LINE: scalar_tensor, mul, where, eq, logical_not, any,
#     logical_not, softmax, full_like, where
#   reads  hidden: bool[batch, 1, 1, scores_d3]
#   reads  scores: float32[batch, scores_d1, scores_d2, scores_d3]
#   writes where: float32[batch, scores_d1, scores_d2, scores_d3]
#   rows batch x scores_d1*scores_d2, reduced over columns scores_d3, in tiles of 1 x 1024, 4 warps
import triton
import triton.language as tl


@triton.jit
def maximum(a, b):
    """The larger one, NaN where either is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def combine(some_a, some_b):
    some = some_a | some_b
    return some


@triton.jit
def fused_logical_not_softmax_full_like_where(
    hidden_ptr,
    scores_ptr,
    where_ptr,
    batch,
    scores_d1,
    scores_d2,
    scores_d3,
    COLS: tl.constexpr,
):
    index = tl.program_id(0)
    row = index % (scores_d1 * scores_d2)
    row1 = index // (scores_d1 * scores_d2)
    col = tl.arange(0, COLS)
    col_ok = col < scores_d3
    hidden = tl.load(hidden_ptr + row1 * scores_d3 + col, mask=col_ok)
    scores = tl.load(
        scores_ptr + row1 * scores_d1 * scores_d2 * scores_d3 + row * scores_d3 + col,
        mask=col_ok,
    )
    where = tl.where(hidden, float("-inf"), scores * 0.125)
    not_ = ~(where == float("-inf"))
    # any_ over col
    any_ = tl.reduce(tl.where(col_ok, not_.to(tl.int32), 0), 0, combine)
    any_ = any_ != 0
    # largest, total over col, of the row in registers
    where = tl.where(col_ok, where, float("-inf"))
    largest = tl.reduce(where, 0, maximum)
    total = tl.sum(tl.exp(where - largest), 0)
    total = tl.where(largest == float("-inf"), 0.0, total)
    where_1 = tl.where(~any_, 0.0, tl.exp(where - largest) * (1.0 / total))
    tl.store(
        where_ptr + row1 * scores_d1 * scores_d2 * scores_d3 + row * scores_d3 + col,
        where_1,
        mask=col_ok,
    )
