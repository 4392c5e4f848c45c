"""Dispatch: selects the specialization of a program by the number of tokens.

In: the same launches with norms stored and with norms folded, and a target. Out: for each the token
buckets that it serves, decided once, before any kernel is built::

    choose_ranges([stored, folded], ("batch", "seq"), make_tiles(options, "sm_90"))
        ->  [TokenRange(batch*seq, {512, 1024, 4096}), TokenRange(batch*seq, {16, 32, ..., 256})]
"""

from __future__ import annotations

from collections.abc import Sequence

from turbotx import ir
from turbotx.ir.expr import sizes_of
from turbotx.kernels.gemm_heuristics import BUCKETS
from turbotx.kernels.schedule_selector import Tiles, structure_of
from turbotx.kernels.triton.gemm_template import GemmTemplate
from turbotx.kernels.tuned import load_tuned
from turbotx.options import Options
from turbotx.program.assembly import Assembly
from turbotx.program.executable import TokenRange
from turbotx.runtime.cuda.gemm import make_template, with_settings


def choose_ranges(
    assemblies: Sequence[Assembly], dims: Sequence[str], tiles: Tiles
) -> list[TokenRange | None]:
    """Return the range of each specialization: plain, norms folded, or quantizing in the GEMMs;
    None for all calls."""
    if len(assemblies) == 1:
        return [None]
    stored, folded = (_templates(a) for a in assemblies)
    chosen = frozenset(b for b in BUCKETS if tiles.folds(stored, folded, b))
    tokens = sizes_of(
        dict.fromkeys(
            x.rows for x in assemblies[1].launches if isinstance(x, ir.GemmLaunch) and _differs(x)
        )
    )
    structure = structure_of(tuple(folded))
    served = (frozenset(BUCKETS) - chosen, chosen)
    return [TokenRange(tokens, tuple(dims), buckets, BUCKETS, structure) for buckets in served]


def _differs(launch: ir.GemmLaunch) -> bool:
    return launch.gemm.folds or (launch.int8 is not None and launch.int8.x_peaks is not None)


def _templates(assembly: Assembly) -> list[GemmTemplate]:
    gemms = (x for x in assembly.launches if isinstance(x, ir.GemmLaunch))
    found = (make_template(x) for x in gemms)
    return [with_settings(t) for t in found if t is not None]


def make_tiles(options: Options, target: str, gpu: str = "") -> Tiles:
    """Return the tile selector of a target, with the options' and the tuned schedules.

    gpu: the device's name, such as "NVIDIA H100"; "" if there is none."""
    tuned = load_tuned(gpu) if gpu else {}
    return Tiles(options.schedule_pairs, target, tuned, options.gemms, options.norms)
