"""Print the prefetch of a GEMM's weight to L2 before it waits for the previous kernel.

In: a template and a schedule. Out: lines between a program's index computation and its wait, see
`dependent.py`. Nothing is loaded to registers, so a weight that another kernel writes is not read
too early: the write goes through the same L2. Only the program's own tile of the weight is
prefetched, by the first tile of tokens, at most `MOST_NBYTES`.
"""

from __future__ import annotations

from dataclasses import replace

from turbotx.kernels.schedule import power_above
from turbotx.kernels.triton.gemm_template import GemmSchedule, GemmTemplate
from turbotx.kernels.triton.specialize import Flag, specialize_body

# `GemmSchedule.prefetch`.
LINES, BULK = 1, 2
LINE_NBYTES = 128
# Most bytes that a program prefetches: a few KB per thread block cover a launch, and more would
# evict data that other programs need.
MOST_NBYTES = 64 * 1024


def print_prefetch(template: GemmTemplate, schedule: GemmSchedule, aligned: bool) -> list[str]:
    """Return the lines, empty if the schedule has no prefetch.

    aligned: rows of the weight begin at multiples of 16 bytes.
    """
    t, s = template, schedule
    if not s.prefetch:
        return []
    if t.group:  # a stored byte has two inputs
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
    """Return the columns of k to prefetch: the program's, limited by MOST_NBYTES."""
    steps = -(-t.k // s.k_tile)
    own = -(-steps // s.splits) * s.k_tile
    step_nbytes = s.n_tile * (1 + t.gated) * t.item_nbytes * s.k_tile
    most = max(1, MOST_NBYTES // step_nbytes) * s.k_tile
    return min(own, most, t.k)


def _even(t: GemmTemplate, s: GemmSchedule, span: int) -> bool:
    """Return whether the row ranges are multiples of 16 bytes."""
    return all(size * t.item_nbytes % 16 == 0 for size in (t.k, s.k_tile, span))
