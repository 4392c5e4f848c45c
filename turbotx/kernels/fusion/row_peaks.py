"""Row peaks: which kernels that quantise rows can go, on a GPU, for the products that read them.

In: the fused regions of a graph whose kernels quantise all rows. Out: a `PeakFold` for each that is
of one GEMM's rows or of attention's: these leave the largest magnitudes of their rows by part, and
the products that read them quantise as they read::

    linear, [gelu, row_scale, quantize_rows], linear
        ->  linear_gelu (leaves rows and magnitudes), linear (quantises what it reads)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.cache_ops import cache_store
from turbotx.ir.expr import product
from turbotx.ir.quantized_ops import quantize_rows, quantized_linear
from turbotx.ir.strides import layout_of
from turbotx.kernels.fusion.epilogue import (
    Epilogue,
    is_packable,
    match_epilogue,
    packable_inputs,
)
from turbotx.kernels.fusion.fuse import FusedRegion
from turbotx.passes.partition import Region


@dataclass(frozen=True)
class PeakFold:
    """Rows of floats, and as int8. maker: the node whose launch stores them, and leaves their
    largest magnitudes; end: what that launch then does in the region's place, None: it stores
    them anyway."""

    rows: fx.Node
    narrow: fx.Node
    maker: fx.Node
    end: Epilogue | None
    fused: FusedRegion


def find_peaks(
    fused: Sequence[FusedRegion], kinds: Mapping[fx.Node, str],
    epilogues: Mapping[fx.Node, Epilogue],
) -> list[PeakFold]:  # fmt: skip
    """Return the kernels of rows that a product can quantise. `epilogues`: those found already."""
    ends = {e.output: e.linear for e in epilogues.values()}
    found = (_match(f, fused, kinds, ends) for f in fused)
    return [fold for fold in found if fold is not None]


def _match(
    f: FusedRegion, fused: Sequence[FusedRegion], kinds: Mapping[fx.Node, str],
    ends: Mapping[fx.Node, fx.Node],
) -> PeakFold | None:  # fmt: skip
    """Read a region as int8 rows and their scale, alone or behind the end of one product."""
    narrow = next((n for n in f.region.outputs if g.is_call(n, quantize_rows)), None)
    if narrow is None or not all(is_packable(user, kinds) for user in narrow.users):
        return None
    rows, scale = g.operand(narrow, 0), g.operand(narrow, 1)
    if set(f.region.outputs) != {narrow, scale}:
        return None
    before = tuple(n for n in f.region.nodes if n not in (narrow, scale))
    if before:
        region = Region(before, (rows,))
        for linear in packable_inputs(f, fused, kinds) if rows in before else ():
            end = None if linear.target is not quantized_linear else match_epilogue(
                region, linear, kinds
            )  # fmt: skip
            if end is not None:
                return PeakFold(rows, narrow, rows, end, f)
        return None
    layout = layout_of(rows)
    if layout is None or not layout.is_contiguous or layout.offset != 0:
        return None
    maker = layout.root
    linear = ends.get(maker, maker)
    by_gemm = linear.target is quantized_linear and is_packable(linear, kinds)
    own = g.shape(maker)
    width = own[-1] if by_gemm else product(own[2:])
    if not (by_gemm or _attends(maker, kinds)) or g.shape(rows)[-1] != width:
        return None
    return PeakFold(rows, narrow, maker, None, f) if product(own) == product(layout.shape) else None


def _attends(node: fx.Node, kinds: Mapping[fx.Node, str]) -> bool:
    """Tell whether it is attention whose keys are no cache's: over those a launch may run in parts,
    none of which has whole rows."""
    keys = layout_of(g.operand(node, 1)) if kinds[node] == "attention" else None
    return keys is not None and keys.root.target is not cache_store
