"""Print the prefetch of a GEMM's weight to L2 while it waits for the previous kernel.

In: a template and a schedule. Out: lines that go between the place of a program and its wait, see
`dependent.py`. Nothing is read into registers, so a weight that some kernel writes is not read too
early: L2 is where such a write arrives as well. Only what the tile of the weight holds is asked
for, by the first tile of tokens, and no more than `MOST_NBYTES` of it.
"""

from __future__ import annotations

from dataclasses import replace

from turbotx.kernels.schedule import power_above
from turbotx.kernels.triton.gemm_template import GemmSchedule, GemmTemplate
from turbotx.kernels.triton.specialize import Flag, specialize_body

# `GemmSchedule.prefetch`.
LINES, BULK = 1, 2
LINE_NBYTES = 128
# What a program brings at most, of all that it will read: a few KB a thread block are enough to
# cover a launch, and what comes too early drives out what others need.
MOST_NBYTES = 64 * 1024


def print_prefetch(template: GemmTemplate, schedule: GemmSchedule, aligned: bool) -> list[str]:
    """Return the lines; none where the schedule wants none.

    aligned: rows of the weight begin at multiples of 16 bytes.
    """
    t, s = template, schedule
    if not s.prefetch:
        return []
    if t.group:  # bytes are what is stored, each of two inputs
        depth = -(-t.k // t.group) * t.group
        t, s = replace(t, k=depth // 2, group=0), replace(s, k_tile=s.k_tile // 2)
    span = _span(t, s)
    bulk = s.prefetch == BULK and aligned and not t.flipped and _even(t, s, span)
    line = LINE_NBYTES // t.item_nbytes
    wide = max(1, s.n_tile // line) if t.flipped else power_above(-(-span // line))
    flags: dict[str, Flag] = {
        "N": t.n, "K": t.k, "GATED": t.gated, "N_MASKED": t.n % s.n_tile != 0, "SPLITS": s.splits,
        "NUM_WARPS": s.num_warps, "SPAN": span, "LINE": line, "LINES": wide,
        "DEEP": power_above(span), "ITEM_NBYTES": t.item_nbytes,
    }  # fmt: skip
    how = "by_rows" if bulk else "across" if t.flipped else "along"
    return ["", *specialize_body("prefetch", how, flags)]


def _span(t: GemmTemplate, s: GemmSchedule) -> int:
    """Of how many columns of k: those of a program, or as many steps as may be brought."""
    steps = -(-t.k // s.k_tile)
    own = -(-steps // s.splits) * s.k_tile
    step_nbytes = s.n_tile * (1 + t.gated) * t.item_nbytes * s.k_tile
    most = max(1, MOST_NBYTES // step_nbytes) * s.k_tile
    return min(own, most, t.k)


def _even(t: GemmTemplate, s: GemmSchedule, span: int) -> bool:
    """Whether all that a row has between `begin` and `stop` are multiples of 16 bytes."""
    return all(size * t.item_nbytes % 16 == 0 for size in (t.k, s.k_tile, span))
