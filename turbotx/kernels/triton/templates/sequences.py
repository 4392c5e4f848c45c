"""Reductions and running sums over each packed sequence: `turbotx.ir.packed_ops` as kernels.

x and out are dense: (before, tokens, after) of x, where sequence n has the tokens [bounds[n],
bounds[n + 1]). One program a sequence and a tile of columns, which passes over its tokens once.
"""

import triton
import triton.language as tl

from turbotx.kernels.triton.templates.functions import maximum

WHICH = tl.constexpr(None)  # "sum", "max", "first", "last" or "cumsum"
SUMS = tl.constexpr(None)  # the compute dtype
STORED = tl.constexpr(None)  # the dtype of out
LEAST = tl.constexpr(None)  # the maximum of an empty integer sequence; None: -inf


@triton.jit
def reduce_tokens(x_ptr, begin, end, col, after, ROWS: tl.constexpr, COLS: tl.constexpr):
    if WHICH == "sum":
        least = 0
    elif LEAST is None:
        least = float("-inf")
    else:
        least = LEAST
    found = tl.full((ROWS, COLS), least, SUMS)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        ok = (row < end) & (col < after)
        x = tl.load(x_ptr + row * after + col, mask=ok, other=least).to(SUMS)
        if WHICH == "sum":
            found += x
        else:
            found = maximum(found, x)
    if WHICH == "sum":
        value = tl.sum(found, 0, keep_dims=True)
    else:
        value = tl.reduce(found, 0, maximum, keep_dims=True)
    return value


@triton.jit
def sequence_reduce(
    x_ptr, bounds_ptr, out_ptr, before, tokens, after, ROWS: tl.constexpr, COLS: tl.constexpr
):
    sequence = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(after, COLS)
    outer = tl.program_id(1) // tiles
    col = tl.program_id(1) % tiles * COLS + tl.arange(0, COLS)[None, :]
    begin = tl.load(bounds_ptr + sequence)
    end = tl.load(bounds_ptr + sequence + 1)
    x_ptr += outer.to(tl.int64) * tokens * after
    if WHICH == "first" or WHICH == "last":
        at = begin if WHICH == "first" else end - 1
        # A token that there is none of is 0.
        width = tl.where(begin < end, after, 0)
        value = tl.load(x_ptr + at * after + col, mask=col < width, other=0)
    else:
        value = reduce_tokens(x_ptr, begin, end, col, after, ROWS, COLS)
    out_ptr += (sequence * before + outer) * after
    tl.store(out_ptr + col, value.to(STORED), mask=col < after)


@triton.jit
def sequence_cumsum(
    x_ptr, bounds_ptr, out_ptr, before, tokens, after, ROWS: tl.constexpr, COLS: tl.constexpr
):
    sequence = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(after, COLS)
    outer = tl.program_id(1) // tiles
    col = tl.program_id(1) % tiles * COLS + tl.arange(0, COLS)[None, :]
    begin = tl.load(bounds_ptr + sequence)
    # Behind the last sequence are tokens of none, whose sums are 0.
    beyond = sequence == tl.num_programs(0) - 1
    end = tl.load(bounds_ptr + sequence + 1, mask=sequence < tl.num_programs(0) - 1, other=0)
    end = tl.where(beyond, tokens, end)
    x_ptr += outer.to(tl.int64) * tokens * after
    out_ptr += outer.to(tl.int64) * tokens * after
    total = tl.zeros((1, COLS), SUMS)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        ok = (row < end) & (col < after)
        x = tl.load(x_ptr + row * after + col, mask=ok, other=0).to(SUMS)
        x = tl.where(beyond, 0, x)
        sums = total + tl.cumsum(x, 0)
        tl.store(out_ptr + row * after + col, sums.to(STORED), mask=ok)
        total += tl.sum(x, 0, keep_dims=True)
