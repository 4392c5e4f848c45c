"""Heuristics: the parameters of tile choices, one row per device class.

In: a target's name. Out: its row; a device between two classes uses the older one's::

    heuristics_for("sm_89")  ->  Heuristics(pointwise_tile=1024, row_nbytes=2048, ...)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Heuristics:
    """Parameters of tile choices.

    pointwise_tile: elements per program without reductions. row_nbytes: the least bytes that a
    reducing program loads at once; short rows share a program. persistent: the longest row kept in
    registers. loop_tile: columns per step of longer rows. strided: side of the square tile if
    memory is contiguous along the rows. few, many: elements up to which a program has 4 and 8
    warps, else 16. row_elements: elements per thread of reduced rows; 0: as for others. programs:
    about the most programs that reduce short rows; 0: one per tile.
    """

    pointwise_tile: int = 1024
    row_nbytes: int = 4 * 32 * 16  # 128 bits for each thread of four warps
    persistent: int = 16384
    loop_tile: int = 4096
    strided: int = 32
    few: int = 1024
    many: int = 4096
    row_elements: int = 0
    programs: int = 0


# Bytes that must be in flight per multiprocessor to saturate memory: bandwidth x latency (about 700
# ns) / multiprocessors. A100 2.0 TB/s, 108: 13 KB. H100 3.35 TB/s, 132: 18 KB. Both have them
# with 8 halves a thread at half occupancy (1024 threads, 16 KB). B200 8 TB/s, 148: 38 KB, which
# takes 16 halves a thread. From data sheets, not from measurements.
TABLE: dict[str, Heuristics] = {
    "sm_80": Heuristics(),
    # H200, BERT-base (32, 128), 24 norms of 4096 x 768: a warp a row instead of four, which need a
    # barrier, took the call from 1,687 to 1,587 us.
    # The device begins no more than 0.8 programs a nanosecond: with one for each row of 768 halves
    # a softmax or LayerNorm ran at 58 % of a copy's bandwidth, whatever its instructions.
    "sm_90": Heuristics(row_elements=32, programs=32768),
    "sm_100": Heuristics(pointwise_tile=2048, row_nbytes=4096, few=2048, many=8192),
    "gfx942": Heuristics(),
}
DEFAULT = Heuristics()


def class_name(target: str) -> str:
    """Return the class of a target; other NVIDIA GPUs belong to the next older class."""
    if target in TABLE:
        return target
    number = int(target.removeprefix("sm_")) if target.removeprefix("sm_").isdigit() else 0
    older = [n for n in TABLE if n.startswith("sm_") and int(n[3:]) <= number]
    return older[-1] if older else "sm_80"


def heuristics_for(target: str) -> Heuristics:
    """Return the row of a target's class."""
    return TABLE[class_name(target)]
