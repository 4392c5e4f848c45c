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

import torch

from turbotx.kernels.triton.dependent import MARK
from turbotx.kernels.triton.functions import functions_in
from turbotx.kernels.triton.gemm_template import GemmSchedule, GemmTemplate, gemm_arguments
from turbotx.kernels.triton.reduce import TYPES
from turbotx.kernels.triton.statistics import (
    RowStatistics,
    load_statistics,
    merge_in_steps,
    merge_loaded,
)

# What becomes of the sums; in the epilogue's own arithmetic, float32.
ACTIVATIONS = {
    "none": "{0}",
    "relu": "tl.where({0} > 0.0, {0}, {0} * 0.0)",  # NaN stays
    "gelu": "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))",  # 16 bits: `gelu`
    # x/2 (1 + tanh(y)) = x / (1 + exp(-2 y)), which loses nothing where tanh(y) is near -1.
    "gelu_tanh": "{0} / (1.0 + tl.exp(-1.5957691216057308 * ({0} + 0.044715 * {0} * {0} * {0})))",
    "silu": "{0} / (1.0 + tl.exp(-{0}))",
    "tanh": "tanh({0})",
}
# Tiles of rows that share a turn through the weight, so that it is read from memory once.
GROUP = 8
# Registers a thread for parts of sums and statistics that it may have asked for at once.
MOST_HELD = 160
# Sums a thread up to which other operands are held in registers beside them.
FEW_SUMS = 32


def print_triton_gemm(
    template: GemmTemplate, schedule: GemmSchedule, name: str | None = None
) -> str:
    """Return the Triton source of a GEMM."""
    return _Gemm(template, schedule).text(name or template.name)


class _Gemm:
    def __init__(self, template: GemmTemplate, schedule: GemmSchedule) -> None:
        self.t, self.s = template, schedule
        self.accumulators = ["sums", "gate"] if template.gated else ["sums"]
        self.n_tiles = -(-template.n // schedule.n_tile)
        self.n_masked = template.n % schedule.n_tile != 0
        self.k_masked = template.k % schedule.k_tile != 0
        self.x_stats = self._row_statistics("x", template.norm)
        self.added_stats = self._row_statistics("residual", template.residual_norm)
        sums = schedule.m_tile * schedule.n_tile * len(self.accumulators)
        self.late = bool(schedule.late) and sums <= FEW_SUMS * 32 * schedule.num_warps
        # Whether they are asked for before the sums, and used after: x's mean may be needed in it.
        self.x_waits, self.added_waits = (
            self.late and s is not None and s.can_wait(schedule.num_warps)
            for s in (None if template.centered else self.x_stats, self.added_stats)
        )

    def text(self, name: str) -> str:
        arguments = [a for a, _ in gemm_arguments(self.t, self.s)]
        arguments += [f"{tile}_TILE: tl.constexpr" for tile in "MNK"]
        body, sums = self._place(), [*self._early_statistics(), *self._sum()]
        end = [*self._finish(), *self._store()]
        if self.s.splits > 1:  # only the last program of a tile needs what is asked for
            body += [*sums, *self._meet(), *(f"    {line}" if line else "" for line in end)]
        else:
            body += [*self._ask(), *sums, *end]
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

    def _row_statistics(self, name: str, norm: str) -> RowStatistics | None:
        t, s = self.t, self.s
        if norm == "none":
            return None
        width, tile, eps = (
            (t.k, s.stat_tile, t.eps) if name == "x" else (t.n, s.residual_tile, t.residual_eps)
        )
        return RowStatistics(name, norm, width, tile or width, eps, s.m_tile)

    def _place(self) -> list[str]:
        lines = [
            "# Programs of a few tiles of tokens go through the weight together.",
            "m_tiles = tl.cdiv(tokens, M_TILE)",
            f"group = tl.program_id(0) // ({GROUP} * {self.n_tiles}) * {GROUP}",
            f"height = tl.minimum(m_tiles - group, {GROUP})",
            f"place = tl.program_id(0) % ({GROUP} * {self.n_tiles})",
            "m_tile = group",
            "n_tile = place",
            "if height > 1:",
            "    # Exact below 2**20; a division of integers is a call, which spills registers.",
            "    n_tile = ((place.to(tl.float32) + 0.5) / height.to(tl.float32)).to(tl.int32)",
            "    m_tile = group + place - n_tile * height",
            "m = m_tile * M_TILE + tl.arange(0, M_TILE)[:, None]",
            "n = n_tile * N_TILE + tl.arange(0, N_TILE)[None, :]",
            "m_ok = m < tokens",
        ]
        lines += [f"n_ok = n < {self.t.n}"] * self.n_masked
        if self.s.splits > 1:
            steps = -(-self.t.k // self.s.k_tile)
            lines += [
                f"begin = tl.program_id(1) * {steps} // {self.s.splits} * K_TILE",
                f"end = (tl.program_id(1) + 1) * {steps} // {self.s.splits} * K_TILE",
            ]
        return [*lines, MARK]

    def _early_statistics(self) -> list[str]:
        """Merge x's row statistics before the sums, where those need them or all cannot wait."""
        if self.x_stats is None or self.x_waits:
            return []
        return merge_in_steps(self.x_stats)

    def _ask(self) -> list[str]:
        """Ask for what is needed once the sums over k are made.

        It comes while they are: the reduction of statistics, with its shuffles and barriers, would
        keep the first tile of the weight waiting.
        """
        if not self.late:
            return []
        lines = ["", "# What is done to the sums asks for its operands before they are made."]
        for s, waits in ((self.x_stats, self.x_waits), (self.added_stats, self.added_waits)):
            lines += load_statistics(s) if s is not None and waits else []
        for k, a in enumerate(self.accumulators):
            off = f" + {self.t.n}" if k else ""
            lines += [f"{a}_{what} = {self._column(what, off)}" for what in self._columns()]
        if self.t.residual:
            lines += self._residual()
        if self.t.residual_norm != "none":
            lines += [f"{name} = {read}" for name, read in self._affine().items()]
        return lines if len(lines) > 2 else []

    def _columns(self) -> list[str]:
        """What is read of each column, by the argument's name."""
        t = self.t
        sums = t.norm == "layer" and not t.centered
        return ["scales"] * t.scaled + ["sums"] * sums + ["bias"] * t.bias

    # --- the sums ---

    def _sum(self) -> list[str]:
        t, s = self.t, self.s
        begin, end = ("begin", "end") if s.splits > 1 else ("0", str(t.k))
        lines = ["", *(f"{a} = tl.zeros((M_TILE, N_TILE), tl.float32)" for a in self.accumulators)]
        k_ok = f"(k < {t.k})"
        x_ok = " & ".join(["m_ok", *([k_ok] if self.k_masked else [])])
        step = ["k = start + tl.arange(0, K_TILE)[None, :]"]
        if t.flipped:
            step.append("k_down = start + tl.arange(0, K_TILE)[:, None]")
        precision = ""
        if t.dtype is torch.float32:
            precision = f', input_precision="{"tf32" if t.tf32 else "ieee"}"'
        x = [f"x = tl.load(x_ptr + m.to(tl.int64) * x_row + k, mask={x_ok}, other=0.0)"]
        if t.centered:
            # A masked x would be -mean: the weight is zero there.
            x.append("x = x - x_mean")
        for k, a in enumerate(self.accumulators):
            step += self._weight(k * t.n)
            step += [] if k else x  # behind the weight, which comes from farther away
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
        lines += [f"    {line}" if line else "" for line in self._ask()]
        lines += [f"    {a} = tl.zeros((M_TILE, N_TILE), tl.float32)" for a in self.accumulators]
        # All parts are asked for at once where a thread has room for them: one after the other they
        # took half of a launch (BERT-base's 768 x 3072 at 40 tokens, H200: 2.4 of 5.6 us).
        held = self.s.m_tile * self.s.n_tile * count * splits
        behind = (self.x_stats if self.x_waits else None, self.added_stats)
        held += sum(2 * s.m_tile * s.step for s in behind if s is not None)
        held //= 32 * self.s.num_warps
        unrolled = "tl.static_range" if held <= MOST_HELD else "range"
        lines.append(f"    for split in {unrolled}({splits}):")
        for k, a in enumerate(self.accumulators):
            at = f"(split * {count} + {k}) * (M_TILE * N_TILE)"
            lines.append(f'        {a} += tl.load(parts + {at} + inside, cache_modifier=".cg")')
        return lines

    # --- the epilogue ---

    def _column(self, argument: str, off: str = "") -> str:
        mask = ", mask=n_ok, other=0.0" if self.n_masked else ""
        return f"tl.load({argument}_ptr + n{off}{mask}).to(tl.float32)"

    def _affine(self) -> dict[str, str]:
        """What a normalised residual is multiplied by, and what is added."""
        second = self._column("residual_norm", f" + {self.t.n}")
        return {"gamma": self._column("residual_norm"), "beta": second}

    def _residual(self) -> list[str]:
        return [
            "residual = tl.load(",
            "    residual_ptr + m.to(tl.int64) * residual_row + n,",
            f"    mask={self._ok()},",
            "    other=0.0,",
            ")",
        ]

    def _finish(self) -> list[str]:
        t = self.t
        lines = merge_loaded(self.x_stats) if self.x_stats is not None and self.x_waits else []
        lines.append("")
        for k, a in enumerate(self.accumulators):
            off = f" + {t.n}" if k else ""
            read = {c: self._column(c, off) for c in self._columns()}
            if self.late:
                read = {c: f"{a}_{c}" for c in read}
            if t.scaled:
                lines.append(f"{a} = {a} * {read['scales']}")
            if t.norm == "layer" and not t.centered:
                lines.append(f"{a} = x_rstd * ({a} - x_mean * {read['sums']})")
            elif t.norm != "none":
                lines.append(f"{a} = x_rstd * {a}")
            if t.bias:
                lines.append(f"{a} += {read['bias']}")
        if t.activation != "none":
            applied = "gelu({0})" if t.light_gelu else ACTIVATIONS[t.activation]
            lines.append(f"sums = {applied.format('sums')}")
        if t.gated:
            lines.append("sums = sums * gate")
        return lines + self._add() if t.residual else lines

    def _add(self) -> list[str]:
        """Add the residual, normalised."""
        t, lines = self.t, []
        if (
            self.added_stats is not None
        ):  # not earlier: mean and rstd would be held through the sums
            merge = merge_loaded if self.added_waits else merge_in_steps
            lines += merge(self.added_stats)
        lines += [] if self.late else self._residual()
        lines.append("residual = residual.to(tl.float32)")
        if t.residual_norm == "layer":
            lines.append("residual = residual - residual_mean")
        if t.residual_norm != "none":
            gamma, beta = self._affine() if self.late else self._affine().values()
            lines.append(f"residual = residual * residual_rstd * {gamma} + {beta}")
        return [*lines, "sums += residual"]

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
