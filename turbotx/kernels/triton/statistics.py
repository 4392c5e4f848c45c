"""Row statistics: how a GEMM merges the (mean, m2) that the previous GEMM stored per row and tile.

In: the width of the rows, and the columns per statistic. Out: flags of templates/gemm.py::

    RowStatistics("layer", 768, 32, 1e-5, 64).flags("X", waits=True)
        ->  {"X_NORM": "layer", "X_PARTS": 24, "X_STEP": 32, ...}
"""

from __future__ import annotations

from dataclasses import dataclass

from turbotx.kernels.schedule import power_above
from turbotx.kernels.triton.specialize import Flag

# Statistics that a program merges at once.
MERGED = 4096
# 32-bit registers per thread that statistics may occupy during the loop over k.
HELD = 64


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of rows of `width` elements, one per `tile` columns; `m_tile` rows per program.

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
        """Statistics merged at once, so that a tile of rows stays in registers."""
        return min(power_above(self.parts), max(16, MERGED // self.m_tile))

    def can_wait(self, num_warps: int) -> bool:
        """Return whether all statistics fit into registers until they are needed."""
        held = 2 * self.m_tile * self.step
        return self.norm != "none" and self.parts <= self.step and held <= HELD * 32 * num_warps

    def flags(self, name: str, waits: bool) -> dict[str, Flag]:
        """Return the flags for the template's rows `name`; waits: loaded early, merged late."""
        values: dict[str, Flag] = {
            "NORM": self.norm, "EPS": self.eps, "WAITS": waits, "PARTS": self.parts,
            "TILE": self.tile, "STEP": self.step,
        }  # fmt: skip
        return {f"{name}_{flag}": value for flag, value in values.items()}
