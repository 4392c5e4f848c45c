"""GEMM template: the compile-time properties of a GEMM launch, its tiles, arguments and grid.

In: a linear with its norm, epilogue and residual. Out: a `GemmTemplate`, a `GemmSchedule`, the
arguments, grid and scratch that they need::

    gemm_arguments(template, schedule)        # [("x_ptr", "storage"), ..., ("tokens", "size"), ...]
    gemm_grid(template, schedule, tokens=40)  # (96, 1, 1)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from turbotx.ir.quantized_ops import KIND_NAMES
from turbotx.kernels.triton.reduce import TYPES

# The narrowest n tile: a row has at most one statistic for each of these columns.
NARROWEST = 16


@dataclass(frozen=True)
class GemmTemplate:
    """The compile-time properties of a GEMM launch: out (tokens, n) = x (tokens, k) times a weight.

    The weight has n rows, or 2 n if `gated`: the second half multiplies the activated first half.
    flipped: it is stored (k, n). norm: of x over k, "none", "layer" or "rms", with eps; scaled:
    rows of the weight times gamma are stored times a power of two. residual_norm: norm of the
    residual over n. stats: store row statistics of out. tf32: float32 factors may be rounded to
    TF32. experts: number of weights, `expert_step` elements apart; 0: one weight. narrow: dtype of
    x and weight with scales (`ir.quantized_ops`); `dtype` is that of everything else. float_rows:
    only the weight is narrow; group: inputs per int4 scale, shifted: and per offset. quantizes: x
    is of `dtype` and is quantized as it is loaded, by its rows' peaks; peaks: store those of out.
    """

    dtype: torch.dtype
    n: int
    k: int
    bias: bool = False
    activation: str = "none"
    gated: bool = False
    residual: bool = False
    norm: str = "none"
    eps: float = 1e-5
    scaled: bool = False
    residual_norm: str = "none"
    residual_eps: float = 1e-5
    stats: bool = False
    flipped: bool = False
    tf32: bool = False
    experts: int = field(default=0, repr=False)  # keys of tuned schedules use the repr
    expert_step: int = field(default=0, repr=False)
    narrow: torch.dtype | None = field(default=None, repr=False)
    float_rows: bool = field(default=False, repr=False)
    group: int = field(default=0, repr=False)
    shifted: bool = field(default=False, repr=False)
    quantizes: bool = field(default=False, repr=False)
    peaks: bool = field(default=False, repr=False)

    @property
    def item_nbytes(self) -> int:
        """Bytes of an element of the weight; int4: of two."""
        return (self.narrow or self.dtype).itemsize

    @property
    def factor_nbytes(self) -> int:
        """Bytes of an element of the weight in the product."""
        return self.dtype.itemsize if self.float_rows else self.item_nbytes

    @property
    def x_nbytes(self) -> int:
        """Bytes of an element of x."""
        return self.dtype.itemsize if self.quantizes else self.factor_nbytes

    @property
    def kind(self) -> str:
        """The kind of the product: "int8", "fp8", or "none" for `dtype`."""
        return "none" if self.narrow is None or self.float_rows else KIND_NAMES[self.narrow]

    @property
    def widened(self) -> bool:
        """Whether fp8 is multiplied as float16: float32 rows need float32 sums, and Triton 3.6 does
        not pipeline rows quantized to fp8 in registers on sm_90."""
        return self.kind == "fp8" and (self.quantizes or self.dtype is torch.float32)

    @property
    def centered(self) -> bool:
        """Whether the mean is subtracted from x instead of from the sums."""
        return self.norm == "layer" and self.dtype is torch.float32

    @property
    def light_gelu(self) -> bool:
        """Whether GELU is computed to 16-bit accuracy, with fewer instructions."""
        return self.activation == "gelu" and self.dtype.itemsize == 2

    @property
    def folds(self) -> bool:
        """Whether it is part of a folded norm."""
        return self.stats or {self.norm, self.residual_norm} != {"none"}

    @property
    def alone(self) -> bool:
        """Whether the library has no equivalent GEMM."""
        return self.narrow is not None or self.folds

    @property
    def name(self) -> str:
        """The name, of dtype, sizes and epilogue: "gemm_float16_768x768_bias"."""
        kind = TYPES[self.dtype].removeprefix("tl.")
        sizes = f"{self.experts}x" * (self.experts > 0) + f"{self.n}x{self.k}"
        narrow = "" if self.narrow is None else KIND_NAMES[self.narrow]
        narrow += "_weights" * self.float_rows + "_shifted" * self.shifted
        parts = ["grouped" * (self.experts > 0), "gemm", narrow, f"{kind}_{sizes}"]
        parts += [f"{self.norm}_norm" * (self.norm != "none")]
        parts += ["flipped" * self.flipped, "bias" * self.bias]
        parts += [self.activation * (self.activation != "none"), "gated" * self.gated]
        normed = "" if self.residual_norm == "none" else f"{self.residual_norm}_norm"
        parts += ["add" * self.residual, normed, "stats" * self.stats]
        parts += ["quantizes" * self.quantizes, "peaks" * self.peaks]
        return "_".join(p for p in parts if p)


@dataclass(frozen=True)
class GemmSchedule:
    """Tile sizes m (tokens) x n (outputs) x k, with k split over `splits` programs.

    stat_tile: columns per statistic of x, the n_tile of the GEMM that stored them (k if one covers
    the row); residual_tile: of the residual's. late: 1 loads statistics, residual and column
    operands before the sums and uses them after, if registers allow; 0 merges x's statistics first
    and loads the rest after the sums. prefetch: work before a dependent launch's wait: 0 none, 1
    prefetches the weight to L2 by lines, 2 by rows.
    """

    m_tile: int
    n_tile: int
    k_tile: int
    num_warps: int = 4
    num_stages: int = 3
    splits: int = 1
    late: int = 1
    prefetch: int = 1
    stat_tile: int = 0
    residual_tile: int = 0


def gemm_arguments(template: GemmTemplate, schedule: GemmSchedule) -> list[tuple[str, str]]:
    """Return the arguments before the tiles with their kinds: "storage", "fp32", "i32", "size", or
    "narrow" for the weight's dtype.

    bias: float32 if a norm is folded into it, like sums and scales of the weight's rows.
    residual_norm: float32 (2, n), gamma and beta. Statistics: float32 (2, tokens, tiles), mean and
    m2; peaks, in their place or that of x's scales: int32 (tokens, tiles). partial, turns: scratch
    of split-K, turns zero before and after. ends: end of each expert's rows; status: set to 1 if
    they are not ascending up to the number of rows.
    """
    t = template
    bias = "fp32" if t.norm != "none" else "storage"
    factor = "storage" if t.narrow is None else "narrow"
    sums = "i32" if t.kind == "int8" else "fp32"
    of_floats = t.quantizes or t.float_rows
    pointers = [("x_ptr", "storage" if of_floats else factor), ("w_ptr", factor)]
    pointers += [("bias_ptr", bias)] * t.bias
    pointers += [("sums_ptr", "fp32")] * (t.norm == "layer" and not t.centered)
    pointers += [("scales_ptr", "fp32")] * (t.scaled or t.narrow is not None)
    pointers += [("x_scale_ptr", "i32" if t.quantizes else "fp32")] * (t.kind != "none")
    pointers += [("x_stats_ptr", "fp32")] * (t.norm != "none")
    pointers += [("residual_ptr", "storage")] * t.residual
    normed = ("residual_norm_ptr", "residual_stats_ptr")
    pointers += [(name, "fp32") for name in normed if t.residual_norm != "none"]
    pointers += [("out_ptr", "storage")]
    pointers += [("stats_ptr", "i32" if t.peaks else "fp32")] * (t.stats or t.peaks)
    pointers += [("partial_ptr", sums), ("turns_ptr", "i32")] * (schedule.splits > 1)
    pointers += [("ends_ptr", "i32"), ("status_ptr", "i32")] * (t.experts > 0)
    sizes = ["tokens", "x_row", "w_row", "out_row"] + ["residual_row"] * t.residual
    return [*pointers, *((size, "size") for size in sizes)]


def gemm_grid(template: GemmTemplate, schedule: GemmSchedule, tokens: int) -> tuple[int, int, int]:
    """Return the grid: one program per tile of out and split-K part; for experts the most row tiles
    that can occur, by column tiles."""
    n_tiles = -(-template.n // schedule.n_tile)
    if template.experts:
        if tokens <= template.experts:  # at most one row per tile, if all have different experts
            return tokens, n_tiles, 1
        return -((-tokens // schedule.m_tile) - template.experts), n_tiles, 1
    tiles = -(-tokens // schedule.m_tile) * n_tiles
    return tiles, schedule.splits, 1


def gemm_scratch(template: GemmTemplate, schedule: GemmSchedule, tokens: int) -> tuple[int, int]:
    """Return the bytes of partial sums and of counters, 0 without split-K."""
    if schedule.splits == 1:
        return 0, 0
    tiles = gemm_grid(template, schedule, tokens)[0]
    sums = tiles * schedule.splits * schedule.m_tile * schedule.n_tile * (1 + template.gated)
    return 4 * sums, 4 * tiles
