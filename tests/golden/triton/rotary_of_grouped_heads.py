# fused_cat_mul_add_clone
#   computes fusion/test_fuse.py:LINE: mul, neg, cat, mul, add, clone
#   reads  x: float32[batch, seq, 64]
#   reads  cos: float32[seq, 8]
#   reads  sin: float32[seq, 8]
#   writes clone: float32[batch, seq, 4, 8]
#   writes clone1: float32[batch, seq, 2, 8]
#   rows batch x seq x 6, by columns 8, in tiles of 128 x 8, 4 warps
import triton
import triton.language as tl


@triton.jit
def fused_cat_mul_add_clone(
    x_ptr,
    cos_ptr,
    sin_ptr,
    clone_ptr,
    clone1_ptr,
    batch,
    seq,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row = index % 6
    row1 = index // 6 % seq
    row2 = index // (seq * 6)
    row_ok = index < batch * seq * 6
    col = tl.arange(0, COLS)[None, :]
    in_first = row < 4
    in_second = row >= 4
    x = tl.load(x_ptr + row2 * seq * 64 + row1 * 64 + row * 8 + col, mask=row_ok)
    cos = tl.load(cos_ptr + row1 * 8 + col, mask=row_ok)
    ge = col >= 4
    x1 = tl.load(x_ptr + row2 * seq * 64 + row1 * 64 + row * 8 + col - 4, mask=row_ok & ge, other=0)
    lt = col < 4
    x2 = tl.load(x_ptr + row2 * seq * 64 + row1 * 64 + row * 8 + col + 4, mask=row_ok & lt, other=0)
    sin = tl.load(sin_ptr + row1 * 8 + col, mask=row_ok)
    add = x * cos + tl.where(lt, -x2, x1) * sin
    tl.store(clone_ptr + row2 * seq * 32 + row1 * 32 + row * 8 + col, add, mask=row_ok & in_first)
    tl.store(
        clone1_ptr + row2 * seq * 16 + row1 * 16 + row * 8 + col - 32,
        add,
        mask=row_ok & in_second,
    )
