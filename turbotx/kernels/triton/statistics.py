"""Print how a GEMM merges the row statistics that the one before has left: means and rsqrt.

In: how wide the rows are, and over how many columns each (mean, m2) is. Out: lines that end in
`NAME_mean` and `NAME_rstd` of a tile of rows, by the merge of Chan, Golub & LeVeque 1979::

    load_statistics(x)     x_part_mean = tl.load(...)          before the sums over k
    merge_loaded(x)        x_mean = tl.sum(x_part_mean * ...)  after them
    merge_in_steps(x)      the same in loops, where a row has too many to be held
"""

from __future__ import annotations

from dataclasses import dataclass

from turbotx.kernels.schedule import power_above

# Statistics that a program merges at a time.
MERGED = 4096
# 32-bit registers a thread that statistics may take while the sums over k are made.
HELD = 64


@dataclass(frozen=True)
class RowStatistics:
    """Those of `name`'s rows of `width` elements, one of every `tile` of them, `m_tile` rows a
    program. norm: "layer" or "rms", with eps."""

    name: str
    norm: str
    width: int
    tile: int
    eps: float
    m_tile: int

    @property
    def parts(self) -> int:
        return -(-self.width // self.tile)

    @property
    def step(self) -> int:
        """How many are merged at a time: beyond, a tile of rows would not stay in registers."""
        return min(power_above(self.parts), max(16, MERGED // self.m_tile))

    def can_wait(self, num_warps: int) -> bool:
        """Tell whether all of them can be held in registers until they are needed."""
        held = 2 * self.m_tile * self.step
        return self.parts <= self.step and held <= HELD * 32 * num_warps


def _count(s: RowStatistics, part: str) -> str:
    return f"tl.maximum(tl.minimum({s.width} - {part} * {s.tile}, {s.tile}), 0).to(tl.float32)"


def _rstd(s: RowStatistics) -> str:
    mean, m2 = f"{s.name}_mean", f"{s.name}_m2"
    square = f"{m2} / {s.width}" + (f" + {mean} * {mean}" if s.norm == "rms" else "")
    return f"{s.name}_rstd = tl.rsqrt({square} + {s.eps!r})"


def load_statistics(s: RowStatistics) -> list[str]:
    """Ask for all of them at once."""
    name = s.name
    return [
        f"{name}_part = tl.arange(0, {s.step})[None, :]",
        f"{name}_part_ok = m_ok & ({name}_part < {s.parts})",
        f"{name}_at = {name}_stats_ptr + m.to(tl.int64) * {s.parts} + {name}_part",
        f"{name}_part_mean = tl.load({name}_at, mask={name}_part_ok, other=0.0)",
        f"{name}_at += tokens.to(tl.int64) * {s.parts}",
        f"{name}_part_m2 = tl.load({name}_at, mask={name}_part_ok, other=0.0)",
    ]


def merge_loaded(s: RowStatistics) -> list[str]:
    """Merge what `load_statistics` asked for."""
    name = s.name
    return [
        "",
        f"# Statistics of {name}'s rows, from those of every {s.tile} columns.",
        f"{name}_count = {_count(s, f'{name}_part')}",
        f"{name}_mean = tl.sum({name}_part_mean * {name}_count, 1, keep_dims=True) / {s.width}",
        f"{name}_off = {name}_part_mean - {name}_mean",
        f"{name}_off = {name}_part_m2 + {name}_count * {name}_off * {name}_off",
        f"{name}_m2 = tl.sum({name}_off, 1, keep_dims=True)",
        _rstd(s),
    ]


def merge_in_steps(s: RowStatistics) -> list[str]:
    """Load and merge them a few at a time: first the mean, then m2 around it."""
    mean, m2 = f"{s.name}_mean", f"{s.name}_m2"
    load = [
        f"part = first + tl.arange(0, {s.step})[None, :]",
        f"part_ok = m_ok & (part < {s.parts})",
        f"count = {_count(s, 'part')}",
        f"at = {s.name}_stats_ptr + m.to(tl.int64) * {s.parts} + part",
        "part_mean = tl.load(at, mask=part_ok, other=0.0)",
    ]
    return [
        "",
        f"# Statistics of {s.name}'s rows, from those of every {s.tile} columns.",
        f"{mean} = tl.zeros((M_TILE, 1), tl.float32)",
        f"{m2} = tl.zeros((M_TILE, 1), tl.float32)",
        f"for first in range(0, {s.parts}, {s.step}):",
        *(f"    {line}" for line in load),
        f"    {mean} += tl.sum(part_mean * count, 1, keep_dims=True) / {s.width}",
        f"for first in range(0, {s.parts}, {s.step}):",
        *(f"    {line}" for line in load),
        f"    part_m2 = tl.load(at + tokens.to(tl.int64) * {s.parts}, mask=part_ok, other=0.0)",
        f"    off = part_mean - {mean}",
        f"    {m2} += tl.sum(part_m2 + count * off * off, 1, keep_dims=True)",
        _rstd(s),
    ]
