"""Row peaks: removes quantizing kernels on a GPU if the products that read the rows can quantize.

In: the fused regions of a graph whose kernels quantize all rows. Out: a `PeakFold` for each region
behind one GEMM or attention: that launch stores the largest magnitudes of its rows by part, and the
products quantize as they load::

    linear, [gelu, row_scale, quantize_rows], linear
        ->  linear_gelu (stores rows and magnitudes), linear (quantizes as it loads)
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
    """Float rows that products quantize themselves.

    maker: the node whose launch stores the rows and their largest magnitudes. end: the epilogue
    that replaces the region; None: the launch stores the rows already."""

    rows: fx.Node
    narrow: fx.Node
    maker: fx.Node
    end: Epilogue | None
    fused: FusedRegion


def find_peaks(
    fused: Sequence[FusedRegion], kinds: Mapping[fx.Node, str],
    epilogues: Mapping[fx.Node, Epilogue],
) -> list[PeakFold]:  # fmt: skip
    """Return the quantizing kernels that products can replace. epilogues: those already found."""
    ends = {e.output: e.linear for e in epilogues.values()}
    found = (_match(f, fused, kinds, ends) for f in fused)
    return [fold for fold in found if fold is not None]


def _match(
    f: FusedRegion, fused: Sequence[FusedRegion], kinds: Mapping[fx.Node, str],
    ends: Mapping[fx.Node, fx.Node],
) -> PeakFold | None:  # fmt: skip
    """Match a region that quantizes rows, alone or after the epilogue of one product."""
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
    """Return whether a node is attention without a cache: over a cache a launch may be split, and
    no part has whole rows."""
    keys = layout_of(g.operand(node, 1)) if kinds[node] == "attention" else None
    return keys is not None and keys.root.target is not cache_store
