"""Jobs of decoding steps on a GPU: flash decoding over the cache, which also appends new rows.

In: an `AttentionKernel`, the number of query heads per key head, a target, tiles. Out: a `Job`
whose cells hold the cache's address and length::

    schedule = choose_split(kernel, group=4, batch=1, kv_heads=8, q_len=1, k_len=1024)
    split_job(kernel, 4, "sm_90", schedule)   # 16 programs a key head, 64 keys of each at a time
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from turbotx.ir.matmul_kernels import AttentionKernel
from turbotx.ir.size_functions import bounded
from turbotx.kernels.attention_jobs import assume, sized_job
from turbotx.kernels.gemm_heuristics import MOST_TURNS
from turbotx.kernels.job import Job
from turbotx.kernels.schedule import power_above
from turbotx.kernels.triton.attention import (
    MOST_DEEP,
    attention_flags,
    attention_pointers,
    describe_masks,
    size_names,
)
from turbotx.kernels.triton.functions import stand_alone
from turbotx.kernels.triton.specialize import specialize

# Programs that fill a device twice, and the most parts per key head.
PROGRAMS, MOST_PARTS = 264, 32
# Most rows of partial sums of a launch.
MOST_ROWS = 16 * PROGRAMS
# Parts that are added at once, and elements of them, fewer in float32. On sm_90 16 parts of 4 rows
# of 16 beside a bias spilled 2 words in float32, and 16 parts of 4 rows of 128 in bfloat16 3
# (Triton 3.7).
MOST_ADDED, MOST_DEEP_ADDED, ADDED, ADDED_WIDE = 16, 8, 8192, 512


@dataclass(frozen=True)
class SplitSchedule:
    """Tile sizes of split attention and the number of parts of the keys.

    rows: rows of partial sums, the power of two above a group's queries. added: parts added at
    once.
    """

    q_tile: int
    k_tile: int
    rows: int
    parts: int
    added: int
    num_warps: int = 4
    num_stages: int = 2


def choose_split(
    kernel: AttentionKernel, group: int, batch: int, kv_heads: int, q_len: int, k_len: int
) -> SplitSchedule | None:
    """Return the schedule for few queries over a cache of capacity `k_len`; None for many
    queries."""
    depth = max(16, power_above(kernel.head_dim))
    rows = power_above(max(1, group * q_len))
    wide = kernel.dtype.itemsize >= 4
    if rows > (16 if wide or depth > 128 else 64) or batch > MOST_DEEP:
        return None
    k_tile = (32 if depth <= 64 else 16) if wide else 64 if depth <= 128 else 32
    pairs = max(1, batch * kv_heads)
    most = (PROGRAMS // pairs, MOST_ROWS // (pairs * rows), MOST_PARTS)
    parts = bounded(-(-k_len // k_tile), 1, *most) if pairs <= MOST_TURNS else 1
    together = MOST_ADDED if depth <= 64 else MOST_DEEP_ADDED
    added = max(1, min(together, (ADDED_WIDE if wide else ADDED) // (rows * depth)))
    stages = 1 if wide else 2
    return SplitSchedule(max(16, rows), k_tile, rows, parts, added, 4, stages)


def split_bounds(group: int, kv_heads: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the upper ends of the ranges of queries and of sequences for which `choose_split`
    returns the same schedule except for the number of parts."""
    rows = [1 << k for k in range(7)]
    pairs = {PROGRAMS // 2, *(MOST_ROWS // (2 * n) for n in rows)}
    batches = {n // kv_heads for n in pairs} | {MOST_DEEP}
    return tuple(n // group for n in rows if n >= group), tuple(sorted(batches - {0}))


def split_workspace_size(kernel: AttentionKernel) -> int:
    """Return the most float32 elements of partial sums of a split launch."""
    return MOST_ROWS * (max(16, power_above(kernel.head_dim)) + 2)


def split_job(
    kernel: AttentionKernel, group: int, target: str, schedule: SplitSchedule,
    divisible: Iterable[str], unaligned: Iterable[str] = (), cells: tuple[str, ...] = (),
) -> Job:  # fmt: skip
    """Return the job of split attention over a cache.

    group: query heads per key head. Other arguments as in `attention_job`.
    """
    s, split, names = schedule, schedule.parts > 1, size_names(kernel)
    name = f"split_{kernel.name}"
    header = [
        name,
        f"  softmax(q k^T * {kernel.scale!r}) v with head_dim {kernel.head_dim}"
        + describe_masks(kernel),
        f"  a program {'a part' if split else 'all'} of the keys of a head of keys,"
        f" {s.k_tile} at a time, for {group} heads of queries, {s.num_warps} warps",
    ]
    flags = attention_flags(kernel) | {
        "GROUP": group, "SPLIT": split, "ROWS": s.rows, "PARTS": s.added,
    }  # fmt: skip
    pointers = attention_pointers(kernel)
    pointers += [("partial_ptr", "*fp32"), ("turns_ptr", "*i32")] * split
    arguments = [*(p for p, _ in pointers), *names, "Q_TILE", "K_TILE"]
    text = specialize("split_attention", "split_attention", name, arguments, flags)
    tiles = (("Q_TILE", s.q_tile), ("K_TILE", s.k_tile))
    assumed = assume(pointers, unaligned, names, divisible)
    return sized_job(
        name, stand_alone(header, text), target, s, pointers, names, tiles, assumed, cells
    )
