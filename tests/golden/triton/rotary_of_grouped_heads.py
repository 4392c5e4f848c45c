# fused_neg_cat_mul_add
#   computes mul, neg, cat, mul, add
#   reads  x: float32[batch, seq, 64]
#   reads  cos: float32[seq, 8]
#   reads  sin: float32[seq, 8]
#   writes add: float32[batch, 4, seq, 8]
#   writes add1: float32[batch, 2, seq, 8]
#   rows batch x 6 x seq, by columns 8, in tiles of 128 x 8, 4 warps
import triton
import triton.language as tl


@triton.jit
def fused_neg_cat_mul_add(
    x_ptr,
    cos_ptr,
    sin_ptr,
    add_ptr,
    add1_ptr,
    batch,
    seq,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row = index % seq
    row1 = index // seq % 6
    row2 = index // (seq * 6)
    row_ok = index < batch * seq * 6
    col = tl.arange(0, COLS)[None, :]
    in_first = row1 < 4
    in_second = row1 >= 4
    x = tl.load(x_ptr + row2 * seq * 64 + row * 64 + row1 * 8 + col, mask=row_ok)
    cos = tl.load(cos_ptr + row * 8 + col, mask=row_ok)
    ge = col >= 4
    x1 = tl.load(x_ptr + row2 * seq * 64 + row * 64 + row1 * 8 + col - 4, mask=row_ok & ge, other=0)
    lt = col < 4
    x2 = tl.load(x_ptr + row2 * seq * 64 + row * 64 + row1 * 8 + col + 4, mask=row_ok & lt, other=0)
    sin = tl.load(sin_ptr + row * 8 + col, mask=row_ok)
    add = x * cos + tl.where(lt, -x2, x1) * sin
    tl.store(
        add_ptr + row2 * seq * 32 + row1 * seq * 8 + row * 8 + col,
        add,
        mask=row_ok & in_first,
    )
    tl.store(
        add1_ptr + -seq * 32 + row2 * seq * 16 + row1 * seq * 8 + row * 8 + col,
        add,
        mask=row_ok & in_second,
    )
