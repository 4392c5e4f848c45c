"""What a GEMM launch is made from: what the graph fixes about it, and its tiles.

In: a linear and its surroundings. Out: a `GemmTemplate`, a `GemmSchedule`, the arguments that both
make necessary, how many programs and how much scratch::

    gemm_arguments(template, schedule)        # [("x_ptr", "storage"), ..., ("tokens", "size"), ...]
    gemm_grid(template, schedule, tokens=40)  # (96, 1, 1)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from turbotx.ir.quantized_ops import KIND_NAMES
from turbotx.kernels.triton.reduce import TYPES

# The narrowest tile of outputs: no row has more statistics than one for each of these.
NARROWEST = 16


@dataclass(frozen=True)
class GemmTemplate:
    """What is fixed about a GEMM launch: out (tokens, n) of x (tokens, k) and a weight.

    The weight has n rows, or 2 n where `gated`: the second half times the first, after activation.
    flipped: it is stored (k, n). norm: "none", "layer" or "rms", of x over k, with eps; scaled: the
    weight with gamma in it is stored times a power of two a row. residual_norm: likewise, of the
    residual over n. stats: leave the row statistics of out behind. tf32: float32 factors may be
    rounded to TF32. experts: unless 0, there are so many weights, `expert_step` elements apart,
    each for some of the rows. narrow: the weight is of this kind, as x is, both with scales
    (`ir.quantized_ops`), and `dtype` is that of all else. float_rows: the weight alone is; group:
    of int4, how many inputs share a scale; shifted: and an offset. quantizes: x is floats of
    `dtype` all the same, and becomes narrow as it is read, by the largest magnitudes of its rows'
    parts; peaks: leave those of out.
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
    experts: int = field(default=0, repr=False)  # what was tuned goes by the text of the others
    expert_step: int = field(default=0, repr=False)
    narrow: torch.dtype | None = field(default=None, repr=False)
    float_rows: bool = field(default=False, repr=False)
    group: int = field(default=0, repr=False)
    shifted: bool = field(default=False, repr=False)
    quantizes: bool = field(default=False, repr=False)
    peaks: bool = field(default=False, repr=False)

    @property
    def item_nbytes(self) -> int:
        """Bytes of an element of the weight, of int4 those of two."""
        return (self.narrow or self.dtype).itemsize

    @property
    def factor_nbytes(self) -> int:
        """Bytes of an element of the weight as it is multiplied."""
        return self.dtype.itemsize if self.float_rows else self.item_nbytes

    @property
    def x_nbytes(self) -> int:
        """Bytes of an element of x."""
        return self.dtype.itemsize if self.quantizes else self.factor_nbytes

    @property
    def kind(self) -> str:
        """What x and the weight are multiplied as: "int8", "fp8", or "none" for `dtype`."""
        return "none" if self.narrow is None or self.float_rows else KIND_NAMES[self.narrow]

    @property
    def widened(self) -> bool:
        """Whether fp8 is multiplied as float16: float32 rows are to have float32's sums, and Triton
        3.6 does not pipeline rows that are quantised to fp8 in registers on sm_90."""
        return self.kind == "fp8" and (self.quantizes or self.dtype is torch.float32)

    @property
    def centered(self) -> bool:
        """Whether the mean is subtracted from x, and not from the sums."""
        return self.norm == "layer" and self.dtype is torch.float32

    @property
    def light_gelu(self) -> bool:
        """Whether its GELU is exact to 16 bits only, in few instructions."""
        return self.activation == "gelu" and self.dtype.itemsize == 2

    @property
    def folds(self) -> bool:
        """Whether it has a part in a folded norm."""
        return self.stats or {self.norm, self.residual_norm} != {"none"}

    @property
    def alone(self) -> bool:
        """Whether no library's GEMM can do the same."""
        return self.narrow is not None or self.folds

    @property
    def name(self) -> str:
        """A name that tells dtype, weight's sizes and epilogue: "gemm_float16_768x768_bias"."""
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
    """A tile of m tokens x n outputs, k at a time; the sums over k in `splits` programs.

    stat_tile: over how many columns each of x's statistics is, the n_tile of the GEMM that left
    them (k where one statistic covers the row); residual_tile: likewise of the residual's.
    late: 1 asks for statistics, residual and columns before the sums and uses them after, where a
    thread has room for them; 0 merges x's statistics first, and asks for the rest after the sums.
    prefetch: what a dependent launch does before it waits: 0 nothing, 1 brings its weight to L2 by
    lines, 2 by rows.
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
    """Return the arguments before the tiles and what they are: "storage", "fp32", "i32", "size", or
    "narrow" for the weight's.

    bias is float32 where a norm is folded into it, as are sums and scales of the weight's rows.
    residual_norm: float32 (2, n), gamma and beta. Statistics: float32 (2, tokens, tiles), means and
    m2; largest magnitudes, in the place of those or of x's scales: int32 (tokens, tiles). partial
    and turns: scratch of a split GEMM, turns zero before and after. ends: where each expert's rows
    end; status: becomes 1 where those are not so many rows' in order.
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
    """Return the number of programs: one a tile of out, and one a part of its sums; of experts so
    many as there can be tiles of rows, by tiles of columns."""
    n_tiles = -(-template.n // schedule.n_tile)
    if template.experts:
        if tokens <= template.experts:  # a row a tile, if none have the same expert
            return tokens, n_tiles, 1
        return -((-tokens // schedule.m_tile) - template.experts), n_tiles, 1
    tiles = -(-tokens // schedule.m_tile) * n_tiles
    return tiles, schedule.splits, 1


def gemm_scratch(template: GemmTemplate, schedule: GemmSchedule, tokens: int) -> tuple[int, int]:
    """Return the bytes of partial sums and of turns that a launch needs, 0 without splits."""
    if schedule.splits == 1:
        return 0, 0
    tiles = gemm_grid(template, schedule, tokens)[0]
    sums = tiles * schedule.splits * schedule.m_tile * schedule.n_tile * (1 + template.gated)
    return 4 * sums, 4 * tiles
