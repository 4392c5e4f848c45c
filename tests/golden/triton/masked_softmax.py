# fused_logical_not_softmax_full_like_where
#   computes scalar_tensor, mul, where, eq, logical_not, any, logical_not, softmax, full_like, where
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
def combine(some0_a, largest1_a, total1_a, some0_b, largest1_b, total1_b):
    some0 = some0_a | some0_b
    largest1 = maximum(largest1_a, largest1_b)
    gap1 = tl.abs(largest1_a - largest1_b)
    fade1 = tl.where(largest1_a == largest1_b, 1.0, tl.exp(-gap1))
    ahead1 = largest1_a > largest1_b
    total1 = total1_a * tl.where(ahead1, 1.0, fade1) + total1_b * tl.where(ahead1, fade1, 1.0)
    return some0, largest1, total1


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
    # any_, largest, total over col in one pass
    any_, largest, total = tl.reduce(
        (
            tl.where(col_ok, not_.to(tl.int32), 0),
            tl.where(col_ok, where, float("-inf")),
            tl.where(col_ok, tl.where(where == float("inf"), float("nan"), 1.0), 0.0),
        ),
        0,
        combine,
    )
    any_ = any_ != 0
    where_1 = tl.where(~any_, 0.0, tl.exp(where - largest) / total)
    tl.store(
        where_ptr + row1 * scores_d1 * scores_d2 * scores_d3 + row * scores_d3 + col,
        where_1,
        mask=col_ok,
    )
