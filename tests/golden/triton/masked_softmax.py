# fused_softmax_f16_64_masked
#   computes softmax(scores * 0.125)
#   reads  scores: float16[batch, heads, q_len, k_len]
#   reads  key_mask: bool[batch, k_len]
#   writes shares: float16[batch, heads, q_len, k_len]
#   rows batch x heads x q_len, reduced over columns k_len, in tiles of 1 x 1024, 4 warps
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
def fused_softmax_f16_64_masked(
    scores_ptr,
    key_mask_ptr,
    shares_ptr,
    batch,
    heads,
    k_len,
    q_len,
    COLS: tl.constexpr,
):
    index = tl.program_id(0)
    row = index % q_len
    row1 = index // q_len % heads
    row2 = index // (heads * q_len)
    col = tl.arange(0, COLS)
    col_ok = col < k_len
    score = tl.load(
        scores_ptr + row2 * heads * k_len * q_len + row1 * k_len * q_len + row * k_len + col,
        mask=col_ok,
    ).to(tl.float32)
    key_visible = tl.load(key_mask_ptr + row2 * k_len + col, mask=col_ok)
    seen = tl.where(key_visible, score * 0.125, float("-inf"))
    # largest, total over col in one pass
    largest, total = tl.reduce(
        (
            tl.where(col_ok, seen, float("-inf")),
            tl.where(col_ok, tl.where(seen == float("inf"), float("nan"), 1.0), 0.0),
        ),
        0,
        combine,
    )
    share = tl.where(largest == float("-inf"), 0.0, tl.exp(seen - largest) / total)
    tl.store(
        shares_ptr + row2 * heads * k_len * q_len + row1 * k_len * q_len + row * k_len + col,
        share,
        mask=col_ok,
    )
