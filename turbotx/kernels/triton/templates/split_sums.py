"""Split-K: every program stores its partial sums; the last one to finish adds all, in order.

A counter per tile determines the last one. SUMS: dtype of the sums, float32, or int32 for int8
factors. GATED: there are two tiles of sums.
"""

import triton
import triton.language as tl


@triton.jit
def leave_part(
    sums, gate, partial_ptr, turns_ptr, SPLITS: tl.constexpr, GATED: tl.constexpr,
    M_TILE: tl.constexpr, N_TILE: tl.constexpr,
):  # fmt: skip
    """Every program leaves its part; the last to come adds them all, in order."""
    size = SPLITS * (1 + GATED) * M_TILE * N_TILE
    parts = partial_ptr + tl.program_id(0).to(tl.int64) * size
    inside = tl.arange(0, M_TILE)[:, None] * N_TILE + tl.arange(0, N_TILE)[None, :]
    tl.store(parts + tl.program_id(1) * (1 + GATED) * (M_TILE * N_TILE) + inside, sums)
    if GATED:
        tl.store(parts + (tl.program_id(1) * 2 + 1) * (M_TILE * N_TILE) + inside, gate)
    tl.debug_barrier()
    turn = tl.atomic_add(turns_ptr + tl.program_id(0), 1, sem="acq_rel")
    return turn, parts, inside


@triton.jit
def add_part(
    sums, gate, parts, inside, split, GATED: tl.constexpr, M_TILE: tl.constexpr,
    N_TILE: tl.constexpr,
):  # fmt: skip
    own = parts + split * (1 + GATED) * (M_TILE * N_TILE) + inside
    sums += tl.load(own, cache_modifier=".cg")
    if GATED:
        gate += tl.load(own + M_TILE * N_TILE, cache_modifier=".cg")
    return sums, gate


@triton.jit
def add_parts(
    parts, inside, SPLITS: tl.constexpr, UNROLLED: tl.constexpr, GATED: tl.constexpr,
    SUMS: tl.constexpr, M_TILE: tl.constexpr, N_TILE: tl.constexpr,
):  # fmt: skip
    sums = tl.zeros((M_TILE, N_TILE), SUMS)
    if GATED:
        gate = tl.zeros((M_TILE, N_TILE), SUMS)
    else:
        gate = 0.0
    if UNROLLED:
        for split in tl.static_range(SPLITS):
            sums, gate = add_part(sums, gate, parts, inside, split, GATED, M_TILE, N_TILE)
    else:
        for split in range(SPLITS):
            sums, gate = add_part(sums, gate, parts, inside, split, GATED, M_TILE, N_TILE)
    return sums, gate
