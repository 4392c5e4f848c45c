"""Print a GEMM with everything around it as Triton: normalised input, epilogue, row statistics.

In: a `GemmTemplate`, what the graph fixes about a linear and its surroundings, and a
`GemmSchedule`. Out: stand-alone source of one function; rows are tokens, the weight is (n, k)::

    out = activation(norm(x) w^T + bias) [* the same of the second half of w] + [norm of] residual

A norm is folded: LN(x) W = rstd * (x (gamma W) - mean * sums) + beta W + bias, where sums are
those of gamma W over k, as it is stored (see `folded.py`), so that its rounding cancels with the
mean. float32 subtracts the mean from x instead, which rounds as LayerNorm itself does. A residual
is normalised as it is read. mean and rstd come from statistics that the GEMM before has left
behind: (mean, m2) of each row over each of its tiles, which merge without cancellation (Chan,
Golub & LeVeque 1979).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turbotx.kernels.schedule import power_above
from turbotx.kernels.triton_functions import functions_in
from turbotx.kernels.triton_reduce import TYPES

# What becomes of the sums; in the epilogue's own arithmetic, float32.
ACTIVATIONS = {
    "none": "{0}",
    "relu": "tl.where({0} > 0.0, {0}, {0} * 0.0)",  # NaN stays
    "gelu": "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))",
    "gelu_tanh": "0.5 * {0} * (1.0 + tanh(0.79788456 * ({0} + 0.044715 * {0} * {0} * {0})))",
    "silu": "{0} / (1.0 + tl.exp(-{0}))",
    "tanh": "tanh({0})",
}
# Tiles of rows that share a turn through the weight, so that it is read from memory once.
GROUP = 8
# The narrowest tile of outputs: no row has more statistics than one for each of these.
NARROWEST = 16
# Statistics that a program merges at a time.
MERGED = 4096


@dataclass(frozen=True)
class GemmTemplate:
    """What is fixed about a GEMM launch: out (tokens, n) of x (tokens, k) and a weight.

    The weight has n rows, or 2 n where `gated`: the second half times the first, after activation.
    flipped: it is stored (k, n). norm: "none", "layer" or "rms", of x over k, with eps; scaled: the
    weight with gamma in it is stored times a power of two a row. residual_norm: likewise, of the
    residual over n. stats: leave the row statistics of out behind. tf32: float32 factors may be
    rounded to TF32.
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

    @property
    def centered(self) -> bool:
        """Whether the mean is subtracted from x, and not from the sums."""
        return self.norm == "layer" and self.dtype is torch.float32

    @property
    def folds(self) -> bool:
        """Whether it has a part in a folded norm: then no library's GEMM can do the same."""
        return self.stats or {self.norm, self.residual_norm} != {"none"}

    @property
    def name(self) -> str:
        kind = TYPES[self.dtype].removeprefix("tl.")
        parts = [f"gemm_{kind}_{self.n}x{self.k}", f"{self.norm}_norm" * (self.norm != "none")]
        parts += ["flipped" * self.flipped, "bias" * self.bias]
        parts += [self.activation * (self.activation != "none"), "gated" * self.gated]
        normed = "" if self.residual_norm == "none" else f"{self.residual_norm}_norm"
        parts += ["add" * self.residual, normed, "stats" * self.stats]
        return "_".join(p for p in parts if p)


@dataclass(frozen=True)
class GemmSchedule:
    """A tile of m tokens x n outputs, k at a time; the sums over k in `splits` programs.

    stat_tile: over how many columns each of x's statistics is, the n_tile of the GEMM that left
    them (k where one statistic covers the row); residual_tile: likewise of the residual's.
    """

    m_tile: int
    n_tile: int
    k_tile: int
    num_warps: int = 4
    num_stages: int = 3
    splits: int = 1
    stat_tile: int = 0
    residual_tile: int = 0


def gemm_arguments(template: GemmTemplate, schedule: GemmSchedule) -> list[tuple[str, str]]:
    """Return the arguments before the tiles and what they are: "storage", "fp32", "i32" or "size".

    bias is float32 where a norm is folded into it, as are sums and scales of the weight's rows.
    residual_norm: float32 (2, n), gamma and beta. Statistics: float32 (2, tokens, tiles), means and
    m2. partial and turns: scratch of a split GEMM, turns zero before and after.
    """
    t = template
    bias = "fp32" if t.norm != "none" else "storage"
    pointers = [("x_ptr", "storage"), ("w_ptr", "storage")]
    pointers += [("bias_ptr", bias)] * t.bias
    pointers += [("sums_ptr", "fp32")] * (t.norm == "layer" and not t.centered)
    pointers += [("scales_ptr", "fp32")] * t.scaled
    pointers += [("x_stats_ptr", "fp32")] * (t.norm != "none")
    pointers += [("residual_ptr", "storage")] * t.residual
    normed = ("residual_norm_ptr", "residual_stats_ptr")
    pointers += [(name, "fp32") for name in normed if t.residual_norm != "none"]
    pointers += [("out_ptr", "storage")]
    pointers += [("stats_ptr", "fp32")] * t.stats
    pointers += [("partial_ptr", "fp32"), ("turns_ptr", "i32")] * (schedule.splits > 1)
    sizes = ["tokens", "x_row", "w_row", "out_row"] + ["residual_row"] * t.residual
    return [*pointers, *((size, "size") for size in sizes)]


def print_triton_gemm(
    template: GemmTemplate, schedule: GemmSchedule, name: str | None = None
) -> str:
    """Return the Triton source of a GEMM."""
    return _Gemm(template, schedule).text(name or template.name)


def gemm_grid(template: GemmTemplate, schedule: GemmSchedule, tokens: int) -> tuple[int, int, int]:
    """Return the number of programs: one a tile of out, and one a part of its sums."""
    tiles = -(-tokens // schedule.m_tile) * -(-template.n // schedule.n_tile)
    return tiles, schedule.splits, 1


def gemm_scratch(template: GemmTemplate, schedule: GemmSchedule, tokens: int) -> tuple[int, int]:
    """Return the bytes of partial sums and of turns that a launch needs, 0 without splits."""
    if schedule.splits == 1:
        return 0, 0
    tiles = gemm_grid(template, schedule, tokens)[0]
    sums = tiles * schedule.splits * schedule.m_tile * schedule.n_tile * (1 + template.gated)
    return 4 * sums, 4 * tiles


class _Gemm:
    def __init__(self, template: GemmTemplate, schedule: GemmSchedule) -> None:
        self.t, self.s = template, schedule
        self.accumulators = ["sums", "gate"] if template.gated else ["sums"]
        self.n_tiles = -(-template.n // schedule.n_tile)
        self.n_masked = template.n % schedule.n_tile != 0
        self.k_masked = template.k % schedule.k_tile != 0

    def text(self, name: str) -> str:
        arguments = [a for a, _ in gemm_arguments(self.t, self.s)]
        arguments += [f"{tile}_TILE: tl.constexpr" for tile in "MNK"]
        body = [*self._place(), *self._statistics(), *self._sum()]
        end = [*self._finish(), *self._store()]
        if self.s.splits > 1:
            body += [*self._meet(), *(f"    {line}" for line in end)]
        else:
            body += end
        lines = ["@triton.jit", f"def {name}(", *(f"    {a}," for a in arguments), "):"]
        lines += [f"    {line}" if line else "" for line in body]
        printed = "\n".join(lines)
        functions = "".join(f"{f}\n\n\n" for f in functions_in(printed))
        return f"{self._header(name)}\n\n\n{functions}{printed}\n"

    def _header(self, name: str) -> str:
        t, s = self.t, self.s
        x = {"none": "x", "layer": "layer_norm(x)", "rms": "rms_norm(x)"}[t.norm]
        inner = f"{x} w^T" + " + bias" * t.bias
        formula = inner if t.activation == "none" else f"{t.activation}({inner})"
        residual = {"none": "residual"}.get(t.residual_norm, f"{t.residual_norm}_norm(residual)")
        formula += " * (second half of w)" * t.gated + f" + {residual}" * t.residual
        split = f", k in {s.splits} parts" if s.splits > 1 else ""
        return "\n".join([
            f"# {name}",
            f"#   out = {formula}, w {t.n * (1 + t.gated)} x {t.k}" + ", with statistics" * t.stats,
            f"#   tiles of {s.m_tile} x {s.n_tile}, {s.k_tile} at a time{split},"
            f" {s.num_warps} warps, {s.num_stages} stages",
            "import triton",
            "import triton.language as tl",
        ])  # fmt: skip

    # --- where a program works ---

    def _place(self) -> list[str]:
        lines = [
            "# Programs of a few tiles of tokens go through the weight together.",
            "m_tiles = tl.cdiv(tokens, M_TILE)",
            f"group = tl.program_id(0) // ({GROUP} * {self.n_tiles}) * {GROUP}",
            f"height = tl.minimum(m_tiles - group, {GROUP})",
            f"place = tl.program_id(0) % ({GROUP} * {self.n_tiles})",
            "m_tile = group + place % height",
            "n_tile = place // height",
            "m = m_tile * M_TILE + tl.arange(0, M_TILE)[:, None]",
            "n = n_tile * N_TILE + tl.arange(0, N_TILE)[None, :]",
            "m_ok = m < tokens",
        ]
        return [*lines, *([f"n_ok = n < {self.t.n}"] if self.n_masked else [])]

    def _statistics(self) -> list[str]:
        """Merge the parts of x's row statistics."""
        t = self.t
        if t.norm == "none":
            return []
        return self._merge("x", t.norm, t.k, self.s.stat_tile or t.k, t.eps)

    def _merge(self, name: str, norm: str, width: int, tile: int, eps: float) -> list[str]:
        """mean and rstd of rows of `width` elements, from statistics of every `tile` of them."""
        parts = -(-width // tile)
        # Beyond these, a tile of rows would not stay in registers.
        step = min(power_above(parts), max(16, MERGED // self.s.m_tile))
        mean, m2 = f"{name}_mean", f"{name}_m2"
        count = f"tl.maximum(tl.minimum({width} - part * {tile}, {tile}), 0).to(tl.float32)"
        load = [
            f"part = first + tl.arange(0, {step})[None, :]",
            f"part_ok = m_ok & (part < {parts})",
            f"count = {count}",
            f"at = {name}_stats_ptr + m.to(tl.int64) * {parts} + part",
            "part_mean = tl.load(at, mask=part_ok, other=0.0)",
        ]
        lines = [
            "",
            f"# Statistics of {name}'s rows, from those of every {tile} columns.",
            f"{mean} = tl.zeros((M_TILE, 1), tl.float32)",
            f"{m2} = tl.zeros((M_TILE, 1), tl.float32)",
            f"for first in range(0, {parts}, {step}):",
            *(f"    {line}" for line in load),
            f"    {mean} += tl.sum(part_mean * count, 1, keep_dims=True) / {width}",
            f"for first in range(0, {parts}, {step}):",
            *(f"    {line}" for line in load),
            f"    part_m2 = tl.load(at + tokens.to(tl.int64) * {parts}, mask=part_ok, other=0.0)",
            f"    off = part_mean - {mean}",
            f"    {m2} += tl.sum(part_m2 + count * off * off, 1, keep_dims=True)",
        ]
        square = f"{m2} / {width}" + (f" + {mean} * {mean}" if norm == "rms" else "")
        return [*lines, f"{name}_rstd = tl.rsqrt({square} + {eps!r})"]

    # --- the sums ---

    def _sum(self) -> list[str]:
        t, s = self.t, self.s
        begin, end = "0", str(t.k)
        lines = [""]
        if s.splits > 1:
            steps = -(-t.k // s.k_tile)
            begin, end = "begin", "end"
            lines += [
                f"begin = tl.program_id(1) * {steps} // {s.splits} * K_TILE",
                f"end = (tl.program_id(1) + 1) * {steps} // {s.splits} * K_TILE",
            ]
        lines += [f"{a} = tl.zeros((M_TILE, N_TILE), tl.float32)" for a in self.accumulators]
        k_ok = f"(k < {t.k})"
        x_ok = " & ".join(["m_ok", *([k_ok] if self.k_masked else [])])
        step = [
            "k = start + tl.arange(0, K_TILE)[None, :]",
            f"x = tl.load(x_ptr + m.to(tl.int64) * x_row + k, mask={x_ok}, other=0.0)",
        ]
        if t.centered:
            # A masked x would be -mean: the weight is zero there.
            step.append("x = x - x_mean")
        if t.flipped:
            step.append("k_down = start + tl.arange(0, K_TILE)[:, None]")
        precision = ""
        if t.dtype is torch.float32:
            precision = f', input_precision="{"tf32" if t.tf32 else "ieee"}"'
        for k, a in enumerate(self.accumulators):
            step += self._weight(k * t.n)
            step.append(f"{a} = tl.dot(x, w, {a}{precision})")
        lines.append(f"for start in range({begin}, {end}, K_TILE):")
        return [*lines, *(f"    {line}" for line in step)]

    def _weight(self, first: int) -> list[str]:
        """Load a (K_TILE, N_TILE) tile of the weight, from output `first` on."""
        off = f" + {first}" if first else ""
        if self.t.flipped:
            ok = ["n_ok"] * self.n_masked + [f"(k_down < {self.t.k})"] * self.k_masked
            mask = f", mask={' & '.join(ok)}, other=0.0" if ok else ""
            return [f"w = tl.load(w_ptr + k_down.to(tl.int64) * w_row + n{off}{mask})"]
        down = "(n_tile * N_TILE + tl.arange(0, N_TILE)[:, None])"
        ok = [f"(down < {self.t.n})"] * self.n_masked + [f"(k < {self.t.k})"] * self.k_masked
        mask = f", mask={' & '.join(ok)}, other=0.0" if ok else ""
        return [
            f"down = {down}",
            f"w = tl.trans(tl.load(w_ptr + (down{off}).to(tl.int64) * w_row + k{mask}))",
        ]

    def _meet(self) -> list[str]:
        """Leave a part of the sums; the last program to come adds all of them, in order."""
        splits, count = self.s.splits, len(self.accumulators)
        lines = [
            "",
            "# Every program leaves its part; the last to come adds them all, in order.",
            f"size = {splits * count} * M_TILE * N_TILE",
            "parts = partial_ptr + tl.program_id(0).to(tl.int64) * size",
            "inside = tl.arange(0, M_TILE)[:, None] * N_TILE + tl.arange(0, N_TILE)[None, :]",
        ]
        for k, a in enumerate(self.accumulators):
            own = f"(tl.program_id(1) * {count} + {k}) * (M_TILE * N_TILE)"
            lines.append(f"tl.store(parts + {own} + inside, {a})")
        lines += [
            "tl.debug_barrier()",
            'turn = tl.atomic_add(turns_ptr + tl.program_id(0), 1, sem="acq_rel")',
            f"if turn == {splits - 1}:",
            "    tl.store(turns_ptr + tl.program_id(0), 0)",
        ]
        lines += [f"    {a} = tl.zeros((M_TILE, N_TILE), tl.float32)" for a in self.accumulators]
        lines.append(f"    for split in range({splits}):")
        for k, a in enumerate(self.accumulators):
            at = f"(split * {count} + {k}) * (M_TILE * N_TILE)"
            lines.append(f'        {a} += tl.load(parts + {at} + inside, cache_modifier=".cg")')
        return lines

    # --- the epilogue ---

    def _column(self, pointer: str, off: str = "") -> str:
        mask = ", mask=n_ok, other=0.0" if self.n_masked else ""
        return f"tl.load({pointer} + n{off}{mask}).to(tl.float32)"

    def _finish(self) -> list[str]:
        t = self.t
        lines = [""]
        for k, a in enumerate(self.accumulators):
            off = f" + {t.n}" if k else ""
            if t.scaled:
                lines.append(f"{a} = {a} * {self._column('scales_ptr', off)}")
            if t.norm == "layer" and not t.centered:
                lines.append(f"{a} = x_rstd * ({a} - x_mean * {self._column('sums_ptr', off)})")
            elif t.norm != "none":
                lines.append(f"{a} = x_rstd * {a}")
            if t.bias:
                lines.append(f"{a} += {self._column('bias_ptr', off)}")
        if t.activation != "none":
            lines.append(f"sums = {ACTIVATIONS[t.activation].format('sums')}")
        if t.gated:
            lines.append("sums = sums * gate")
        if t.residual_norm != "none":  # not earlier: it would be held through the sums
            tile = self.s.residual_tile or t.n
            lines += self._merge("residual", t.residual_norm, t.n, tile, t.residual_eps)
        if t.residual:
            lines += [
                "residual = tl.load(",
                "    residual_ptr + m.to(tl.int64) * residual_row + n,",
                f"    mask={self._ok()},",
                "    other=0.0,",
                ").to(tl.float32)",
            ]
            if t.residual_norm == "layer":
                lines.append("residual = residual - residual_mean")
            if t.residual_norm != "none":
                gamma = self._column("residual_norm_ptr")
                beta = self._column("residual_norm_ptr", f" + {t.n}")
                lines.append(f"residual = residual * residual_rstd * {gamma} + {beta}")
            lines.append("sums += residual")
        return lines

    def _ok(self) -> str:
        return "m_ok & n_ok" if self.n_masked else "m_ok"

    def _store(self) -> list[str]:
        t = self.t
        lines = [
            f"out = sums.to({TYPES[t.dtype]})",
            f"tl.store(out_ptr + m.to(tl.int64) * out_row + n, out, mask={self._ok()})",
        ]
        if not t.stats:
            return lines
        value = "out.to(tl.float32)"
        if self.n_masked:
            lines += [
                f"held = tl.minimum({t.n} - n_tile * N_TILE, N_TILE).to(tl.float32)",
                f"value = tl.where(n_ok, {value}, 0.0)",
            ]
        else:
            lines += ["held = N_TILE * 1.0", f"value = {value}"]
        off = "tl.where(n_ok, value - tile_mean, 0.0)" if self.n_masked else "value - tile_mean"
        return [
            *lines,
            "tile_mean = tl.sum(value, 1, keep_dims=True) / held",
            f"off_mean = {off}",
            "tile_m2 = tl.sum(off_mean * off_mean, 1, keep_dims=True)",
            f"stat = stats_ptr + m.to(tl.int64) * {self.n_tiles} + n_tile",
            "tl.store(stat, tile_mean, mask=m_ok)",
            f"tl.store(stat + tokens.to(tl.int64) * {self.n_tiles}, tile_m2, mask=m_ok)",
        ]
