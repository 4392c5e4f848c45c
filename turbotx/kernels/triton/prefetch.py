"""Print what a GEMM that waits for the kernel before it does meanwhile: bring its weight to L2.

In: a template and a schedule. Out: lines that go between the place of a program and its wait, see
`dependent.py`. Nothing is read into registers, so a weight that some kernel writes is not read too
early: L2 is where such a write arrives as well. Only what the tile of the weight holds is asked
for, by the first tile of tokens, and no more than `MOST_NBYTES` of it.
"""

from __future__ import annotations

from turbotx.kernels.schedule import power_above
from turbotx.kernels.triton.gemm_template import GemmSchedule, GemmTemplate

# `GemmSchedule.prefetch`.
LINES, BULK = 1, 2
LINE_NBYTES = 128
# What a program brings at most, of all that it will read: a few KB a thread block are enough to
# cover a launch, and what comes too early drives out what others need.
MOST_NBYTES = 64 * 1024
MEANWHILE = "# Meanwhile the weight may come to L2, for the first tile of tokens."
# One request for a line where a mask says so. The result is of no use, but there has to be one.
LINE_REQUEST = "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }"
# One request for a row of bytes, by the one thread that a number names.
BULK_REQUEST = (
    "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, $3; "
    "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }"
)


def print_prefetch(template: GemmTemplate, schedule: GemmSchedule, aligned: bool) -> list[str]:
    """Return the lines; none where the schedule wants none.

    aligned: rows of the weight begin at multiples of 16 bytes.
    """
    t, s = template, schedule
    if not s.prefetch:
        return []
    halves = [0, t.n] if t.gated else [0]
    width = s.n_tile * len(halves)
    span = _span(t, s, width * t.dtype.itemsize)
    begin = "begin" if s.splits > 1 else "0"
    stop = f"tl.minimum({begin} + {span}, end)" if s.splits > 1 else str(span)
    lines = ["", MEANWHILE]
    lines.append(f"stop = tl.minimum({stop}, {t.k})" if s.splits > 1 else f"stop = {stop}")
    if s.prefetch == BULK and aligned and not t.flipped and _even(t, s, span):
        return lines + _rows(t, s, halves, begin)
    return lines + (_down if t.flipped else _along)(t, s, halves, begin, span)


def _span(t: GemmTemplate, s: GemmSchedule, step_nbytes: int) -> int:
    """Of how many columns of k: those of a program, or as many steps as may be brought."""
    steps = -(-t.k // s.k_tile)
    own = -(-steps // s.splits) * s.k_tile
    most = max(1, MOST_NBYTES // (step_nbytes * s.k_tile)) * s.k_tile
    return min(own, most, t.k)


def _even(t: GemmTemplate, s: GemmSchedule, span: int) -> bool:
    """Whether all that a row has between `begin` and `stop` are multiples of 16 bytes."""
    return all(size * t.dtype.itemsize % 16 == 0 for size in (t.k, s.k_tile, span))


def _along(t: GemmTemplate, s: GemmSchedule, halves: list[int], begin: str, span: int) -> list[str]:
    """Lines of the weight's rows, which are a program's outputs."""
    line = LINE_NBYTES // t.dtype.itemsize
    count = power_above(-(-span // line))
    ok = "(line < stop) & (m_tile == 0)" + f" & (down < {t.n})" * (t.n % s.n_tile != 0)
    lines = [
        f"line = {begin} + tl.arange(0, {count})[None, :] * {line}",
        "down = n_tile * N_TILE + tl.arange(0, N_TILE)[:, None]",
        f"wanted = {ok}",
    ]
    for half in halves:
        row = f"(down + {half})" if half else "down"
        lines += _request(f"w_ptr + {row}.to(tl.int64) * w_row + line")
    return lines


def _down(t: GemmTemplate, s: GemmSchedule, halves: list[int], begin: str, span: int) -> list[str]:
    """Lines of a weight that is stored the other way, whose rows are steps of k."""
    line = LINE_NBYTES // t.dtype.itemsize
    count = max(1, s.n_tile // line)
    lines = [
        f"down = {begin} + tl.arange(0, {power_above(span)})[:, None]",
        f"line = n_tile * N_TILE + tl.arange(0, {count})[None, :] * {line}",
        f"wanted = (down < stop) & (m_tile == 0) & (line < {t.n})",
    ]
    for half in halves:
        off = f" + {half}" if half else ""
        lines += _request(f"w_ptr + down.to(tl.int64) * w_row + line{off}")
    return lines


def _request(address: str) -> list[str]:
    return [
        f"address = ({address}).to(tl.int64)",
        "tl.inline_asm_elementwise(",
        f'    "{LINE_REQUEST}",',
        '    "=r,l,r", [address, wanted.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,',
        ")",
    ]


def _rows(t: GemmTemplate, s: GemmSchedule, halves: list[int], begin: str) -> list[str]:
    """The weight's rows, each by one request, which the warps take turns at."""
    masked = f"if down < {t.n}:" if t.n % s.n_tile else ""
    lines = ["if m_tile == 0:", "    for row in range(N_TILE):"]
    step, nbytes = ["down = n_tile * N_TILE + row"], f"(stop - {begin}) * {t.dtype.itemsize}"
    for half in halves:
        off = f" + {half}" if half else ""
        step += [
            f"address = (w_ptr + (down{off}).to(tl.int64) * w_row + {begin}).to(tl.int64)",
            "tl.inline_asm_elementwise(",
            f'    "{BULK_REQUEST}",',
            f'    "=r,l,r,r", [address, {nbytes}, row % {s.num_warps} * 32],',
            "    dtype=tl.int32, is_pure=False, pack=1,",
            ")",
        ]
    if masked:
        step = [step[0], masked, *(f"    {line}" for line in step[1:])]
    return lines + [f"        {line}" for line in step]
