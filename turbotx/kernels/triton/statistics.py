"""How a GEMM merges the row statistics that the one before has left: when, and how many at a time.

In: how wide the rows are, and over how many columns each (mean, m2) is. Out: the flags of
templates/gemm.py that say so::

    RowStatistics("layer", 768, 32, 1e-5, 64).flags("X", waits=True)
        ->  {"X_NORM": "layer", "X_PARTS": 24, "X_STEP": 32, ...}
"""

from __future__ import annotations

from dataclasses import dataclass

from turbotx.kernels.schedule import power_above
from turbotx.kernels.triton.specialize import Flag

# Statistics that a program merges at a time.
MERGED = 4096
# 32-bit registers a thread that statistics may take while the sums over k are made.
HELD = 64


@dataclass(frozen=True)
class RowStatistics:
    """Those of rows of `width` elements, one of every `tile` of them, `m_tile` rows a program.
    norm: "none", "layer" or "rms", with eps."""

    norm: str
    width: int
    tile: int
    eps: float
    m_tile: int

    @property
    def parts(self) -> int:
        """Number of partial statistics per row: one per tile of columns."""
        return -(-self.width // self.tile)

    @property
    def step(self) -> int:
        """How many are merged at a time: beyond, a tile of rows would not stay in registers."""
        return min(power_above(self.parts), max(16, MERGED // self.m_tile))

    def can_wait(self, num_warps: int) -> bool:
        """Return whether all of them can be held in registers until they are needed."""
        held = 2 * self.m_tile * self.step
        return self.norm != "none" and self.parts <= self.step and held <= HELD * 32 * num_warps

    def flags(self, name: str, waits: bool) -> dict[str, Flag]:
        """Return the flags of the rows that the template calls `name`, asked for early or not."""
        values: dict[str, Flag] = {
            "NORM": self.norm, "EPS": self.eps, "WAITS": waits, "PARTS": self.parts,
            "TILE": self.tile, "STEP": self.step,
        }  # fmt: skip
        return {f"{name}_{flag}": value for flag, value in values.items()}
