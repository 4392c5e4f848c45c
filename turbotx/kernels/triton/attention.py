"""Print an attention launch as Triton: a flash-attention forward pass, scores never in memory.

In: an `AttentionKernel`. Out: stand-alone source of one function over the operands of the C++
launch: q, k and v in place by strides (a packed GEMM's output among them), out head-merged, then
the sizes of `cpp_attention.SIZES`, dots written as underscores. One program a tile of queries::

    args: q_ptr, k_ptr, v_ptr, out_ptr, [keys_ptr: mask or lengths], [bias_ptr], [sinks_ptr],
        [bounds_ptr, starts_ptr: of packed sequences],
        [cache_ptr, k_table_ptr, v_table_ptr: of a cache that gets k and v], [peaks_ptr], sizes...

Where all keys are in one tile there is no loop, and nothing to carry through one.
Online softmax after Milakov & Gimelshein 2018, tiling after Dao et al. 2022 (FlashAttention).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from turbotx.ir.attention_ops import NO_WINDOW
from turbotx.ir.matmul_kernels import AttentionKernel
from turbotx.kernels.cpp.attention import SIZES
from turbotx.kernels.schedule import power_above
from turbotx.kernels.triton.compiler import POINTEES
from turbotx.kernels.triton.functions import stand_alone
from turbotx.kernels.triton.reduce import TYPES
from turbotx.kernels.triton.specialize import Flag, specialize

# As many as fit the smallest tile of a matrix unit.
FEW_QUERIES = 16
# Up to here one tile may have all keys of a sequence's attention to itself.
ONE_TILE = 64
# Sequences are along a grid's third axis, which has room for as many: no division then finds a
# program's place, which would take longer than all else before its first load.
MOST_DEEP = 65535
NAMES = tuple(name.replace(".", "_") for name in SIZES)
# What attention over a cache takes besides: the columns of its tables, the rows of a block. A tile
# of keys is in one block.
BLOCK_NAMES = ("columns", "block_len")
MOST_KEYS = 64
CACHE_POINTERS = ("cache_ptr", "k_table_ptr", "v_table_ptr")
# The sizes that are strides between vectors of head_dim: multiples of 16 in any packed layout.
STRIDES = tuple(n for n in NAMES if n.split("_")[0] in ("q", "k", "v", "out") and "len" not in n)


@dataclass(frozen=True)
class AttentionSchedule:
    """Queries and keys of a tile, warps, and how many tiles of keys are in flight.

    once: 1 for the form without a loop where one tile has all keys; it is right nowhere else.
    """

    q_tile: int
    k_tile: int
    num_warps: int = 4
    num_stages: int = 2
    once: int = 0


def choose_attention_schedule(
    kernel: AttentionKernel, q_len: int | None = None
) -> AttentionSchedule:
    """Return one of two schedules for a kernel: for few queries, and for many.

    Tiles are as large as registers and 64 KiB of shared memory allow on every target. Of 64
    queries a warp has whole rows, and needs no other's sums. For short sequences they are `once`,
    which `with_keys` takes back where there are more keys.
    """
    schedule = _tiles_for(kernel, q_len)
    return replace(schedule, once=int(q_len is not None and q_len <= ONE_TILE))


def with_keys(schedule: AttentionSchedule, k_len: int) -> AttentionSchedule:
    """Return the schedule for a number of keys: in a loop where they do not fit one tile."""
    return replace(schedule, once=0) if k_len > schedule.k_tile else schedule


def in_blocks(schedule: AttentionSchedule) -> AttentionSchedule:
    """Return the schedule over a cache: no more keys of a tile than a block has, in a loop."""
    return replace(schedule, k_tile=min(schedule.k_tile, MOST_KEYS), once=0)


def size_names(kernel: AttentionKernel) -> tuple[str, ...]:
    """Return the sizes that a kernel takes, in their order."""
    return NAMES + BLOCK_NAMES * kernel.cached


def attention_pointers(kernel: AttentionKernel) -> list[tuple[str, str]]:
    """Return attention's pointer arguments with their Triton types."""
    stored = f"*{POINTEES[kernel.dtype]}"
    pointers = [(f"{tensor}_ptr", stored) for tensor in ("q", "k", "v", "out")]
    if kernel.keys != "all":
        pointers.append(("keys_ptr", {"mask": "*i1", "lengths": "*i64"}[kernel.keys]))
    if kernel.bias != "none":
        kinds = {"boolean": "*i1", "float32": "*fp32", "storage": stored}
        pointers.append(("bias_ptr", kinds[kernel.bias]))
    pointers += [("sinks_ptr", "*fp32")] * kernel.sinks
    pointers += [("bounds_ptr", "*i64"), ("starts_ptr", "*i64")] * kernel.packed
    of_cache = zip(CACHE_POINTERS, (stored, "*i64", "*i64"), strict=True)
    pointers += list(of_cache) * kernel.cached
    return pointers + [("peaks_ptr", "*i32")] * kernel.peaks


def _tiles_for(kernel: AttentionKernel, q_len: int | None) -> AttentionSchedule:
    depth = max(16, power_above(kernel.head_dim))
    few = q_len is not None and q_len <= FEW_QUERIES
    if kernel.dtype.itemsize >= 4:
        # Full float32 products run on the ordinary units: small tiles keep them in registers.
        # (The assembler of Triton 3.6 spills at depth 16 with 16 rows, at 56 registers.)
        # 32 x 32 scores beside sums of depth 64 spilled 3 words of 4 warps on sm_90 with a bias and
        # 2 on sm_80 with causality and a key mask; of 8 warps 6 on sm_90, also with a window;
        # 16 x 32 of 4 warps 4 on sm_80 (Triton 3.9), of 8 none by any release.
        full = kernel.bias == "storage" or (kernel.causal and kernel.keys == "mask")
        q_tile = 32 if depth == 16 or (depth == 64 and not few and not full) else 16
        # A bias beside sums of depth 256 spilled 10 there, and without a second tile in flight 2 of
        # eight warps. So did rows of 80, of which tiles hold 128, beside a bias, lengths or
        # causality; beside a boolean bias and causality two tiles in flight spilled 6 on sm_90, one
        # 2 there and 4 on sm_100 (Triton 3.6): 16 warps spill nothing by any release.
        deep = depth > 128 and kernel.bias != "none"
        padded = depth == 128 and kernel.head_dim < depth
        crowded = padded and kernel.causal and kernel.bias == "boolean"
        stages = 2 if deep or (padded and not crowded) else 1
        warps = 16 if crowded else 8 if deep or depth == 128 or (depth == 64 and full) else 4
        return AttentionSchedule(q_tile, 32 if depth <= 64 else 16, warps, stages)
    if few:
        return AttentionSchedule(16, 64 if depth <= 128 else 32, 4)
    if depth == 16 and kernel.bias != "none":
        # Threads of eight warps would load 64 bits at a time of so short rows, and 64 keys beside a
        # boolean bias spilled 107 words of four warps on sm_100 (Triton 3.7).
        return AttentionSchedule(64, 32, 4)
    # A bias in flight beside the scores does not fit the registers of four warps, nor, beside
    # sums of depth 128, those of eight with 64 keys.
    wide = depth > 64 or kernel.bias == "storage"
    # A window beside a key mask took 168 to 252 registers on sm_80 with 64 keys, and spilled 4
    # words of ModernBERT's.
    windowed = kernel.window != NO_WINDOW and kernel.keys == "mask" and depth == 64
    short = depth > 128 or (depth == 128 and kernel.bias != "none") or windowed
    # With two tiles in flight a boolean bias beside sums of depth 128 spilled 2 words on sm_100
    # (Triton 3.6).
    stages = 1 if depth == 128 and kernel.bias == "boolean" else 2
    return AttentionSchedule(64, 32 if short else 64, 8 if wide else 4, stages)


def print_triton_attention(
    kernel: AttentionKernel, schedule: AttentionSchedule | None = None, name: str | None = None
) -> str:
    """Return the Triton source of an attention launch."""
    schedule, name = schedule or choose_attention_schedule(kernel), name or kernel.name
    schedule = in_blocks(schedule) if kernel.cached else schedule
    header = [
        name,
        f"  softmax(q k^T * {kernel.scale!r}) v with head_dim {kernel.head_dim}"
        + describe_masks(kernel),
        f"  tiles of {schedule.q_tile} queries x {schedule.k_tile} keys,"
        f" {schedule.num_warps} warps",
    ]
    pointers = (name for name, _ in attention_pointers(kernel))
    arguments = [*pointers, *size_names(kernel), "Q_TILE", "K_TILE"]
    flags = attention_flags(kernel) | {"MOST_DEEP": MOST_DEEP}
    if not kernel.cached:
        flags |= {"ONCE": bool(schedule.once), "PACKED": kernel.packed, "PEAKS": kernel.peaks}
    template = "cached_attention" if kernel.cached else "attention"
    return stand_alone(header, specialize(template, template, name, arguments, flags))


def describe_masks(kernel: AttentionKernel) -> str:
    """Return in words, a comma before, which scores attention changes or hides."""
    hidden = [] if kernel.keys == "all" else ["a key mask" if kernel.keys == "mask" else "lengths"]
    hidden += ["causal"] * kernel.causal
    hidden += ["queries at the last keys"] * kernel.late
    hidden += [f"a window of {kernel.window}"] * (kernel.window != NO_WINDOW)
    hidden += [f"scores capped at {kernel.softcap!r}"] * (kernel.softcap != 0)
    hidden += [f"{kernel.bias} bias"] * (kernel.bias != "none") + ["sinks"] * kernel.sinks
    hidden += ["each sequence by itself"] * kernel.packed
    hidden += ["behind a cache, which gets k and v"] * kernel.cached
    return "".join(f", {word}" for word in hidden)


def attention_flags(kernel: AttentionKernel) -> dict[str, Flag]:
    """Return the flags that templates of attention share."""
    left, right = kernel.window
    return {
        "HEAD_DIM": kernel.head_dim,
        "DEPTH": max(16, power_above(kernel.head_dim)),
        "STORED": TYPES[kernel.dtype],
        "PRECISION": "ieee" if kernel.dtype is torch.float32 else None,
        "SCALE": kernel.scale,
        "CAP": kernel.softcap,
        "KEYS": kernel.keys,
        "BIAS": kernel.bias,
        "LEFT": left if left >= 0 else None,
        "RIGHT": 0 if kernel.causal else right if right >= 0 else None,
        "LATE": kernel.late,
        "BLIND_NAN": kernel.blind_nan,
        "BLIND_MEAN": kernel.blind_mean,
        "SINKS": kernel.sinks,
    }


def attention_grid(
    schedule: AttentionSchedule, batch: int, heads: int, q_len: int, packed: bool = False
) -> tuple[int, int, int]:
    """Return the number of programs: one a tile of queries, tiles of one head side by side; packed:
    as many as any lengths of `batch` sequences need, of q_len tokens together."""
    if packed:
        return q_len // schedule.q_tile + batch, heads, 1
    folds = 1 + batch // MOST_DEEP  # without comparing: saved programs keep the arithmetic
    return -(-q_len // schedule.q_tile) * folds, heads, -(-batch // folds)
