"""Prefetch: a dependent GEMM loads its weight to L2 before it waits for the previous kernel.

These lines are between `find_tile` of gemm.py and the wait. Programs of the first tile of tokens
prefetch the first SPAN columns of k of the weight's rows that they read.
"""

import triton
import triton.language as tl

N = tl.constexpr(None)
K = tl.constexpr(None)
GATED = tl.constexpr(None)
N_MASKED = tl.constexpr(None)
SPLITS = tl.constexpr(None)
NUM_WARPS = tl.constexpr(None)
SPAN = tl.constexpr(None)  # columns of k
LINE = tl.constexpr(None)  # elements of a cache line; LINES: most lines of a tile
LINES = tl.constexpr(None)
DEEP = tl.constexpr(None)  # SPAN rounded up to a power of two
ITEM_NBYTES = tl.constexpr(None)
# One request for a line where a mask says so. The result is of no use, but there has to be one.
LINE_REQUEST = tl.constexpr(
    "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }"
)
# One request for a row of bytes, by the one thread that a number names.
BULK_REQUEST = tl.constexpr(
    "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, $3; "
    "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }"
)


@triton.jit
def request_lines(address, wanted):
    tl.inline_asm_elementwise(
        LINE_REQUEST, "=r,l,r", [address.to(tl.int64), wanted.to(tl.int32)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def request_row(address, nbytes, thread):
    tl.inline_asm_elementwise(
        BULK_REQUEST, "=r,l,r,r", [address.to(tl.int64), nbytes, thread],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def find_span(begin, end):
    first = begin if SPLITS > 1 else 0
    stop = tl.minimum(tl.minimum(begin + SPAN, end), K) if SPLITS > 1 else SPAN
    return first, stop


@triton.jit
def along(w_ptr, w_row, m_tile, n_tile, begin, end, N_TILE: tl.constexpr):
    """Meanwhile the weight may come to L2, for the first tile of tokens."""
    # Lines of its rows, which are a program's outputs.
    first, stop = find_span(begin, end)
    line = first + tl.arange(0, LINES)[None, :] * LINE
    down = n_tile * N_TILE + tl.arange(0, N_TILE)[:, None]
    wanted = (line < stop) & (m_tile == 0) & (down < N if N_MASKED else True)
    request_lines(w_ptr + down.to(tl.int64) * w_row + line, wanted)
    if GATED:
        request_lines(w_ptr + (down + N).to(tl.int64) * w_row + line, wanted)


@triton.jit
def across(w_ptr, w_row, m_tile, n_tile, begin, end, N_TILE: tl.constexpr):
    """Meanwhile the weight may come to L2, for the first tile of tokens."""
    # It is stored the other way: lines of its rows, which are steps of k.
    first, stop = find_span(begin, end)
    down = first + tl.arange(0, DEEP)[:, None]
    line = n_tile * N_TILE + tl.arange(0, LINES)[None, :] * LINE
    wanted = (down < stop) & (m_tile == 0) & (line < N)
    request_lines(w_ptr + down.to(tl.int64) * w_row + line, wanted)
    if GATED:
        request_lines(w_ptr + down.to(tl.int64) * w_row + line + N, wanted)


@triton.jit
def by_rows(w_ptr, w_row, m_tile, n_tile, begin, end, N_TILE: tl.constexpr):
    """Meanwhile the weight may come to L2, for the first tile of tokens."""
    # Its rows, each by one request, which the warps take turns at.
    first, stop = find_span(begin, end)
    if m_tile == 0:
        for row in range(N_TILE):
            down = n_tile * N_TILE + row
            nbytes = (stop - first) * ITEM_NBYTES
            thread = row % NUM_WARPS * 32
            if not N_MASKED or down < N:
                request_row(w_ptr + down.to(tl.int64) * w_row + first, nbytes, thread)
                if GATED:
                    request_row(w_ptr + (down + N).to(tl.int64) * w_row + first, nbytes, thread)
