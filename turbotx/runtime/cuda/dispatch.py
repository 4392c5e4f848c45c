"""Share: which calls each of two programs of one model serves, by the number of tokens.

In: the same launches with norms stored and with norms folded, a device. Out: for each the buckets
of tokens in which it is to run, decided once, before anything is built::

    share_calls([stored, folded], ("batch", "seq"), make_tiles(options, device))
        ->  [Share((batch*seq,), {512, 1024, 4096}), Share((batch*seq,), {16, 32, 64, 128, 256})]
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
from turbotx.program.executable import Share
from turbotx.runtime.cuda.gemm import make_template, with_settings
from turbotx.runtime.device import Device


def share_calls(
    assemblies: Sequence[Assembly], dims: Sequence[str], tiles: Tiles | None
) -> list[Share | None]:
    """Return the shares of a program and of its twin with norms folded; None: all calls."""
    if len(assemblies) == 1 or tiles is None:
        return [None] * len(assemblies)
    stored, folded = (_templates(a) for a in assemblies)
    chosen = frozenset(b for b in BUCKETS if tiles.folds(stored, folded, b))
    tokens = dict.fromkeys(
        x.rows for x in assemblies[1].launches if isinstance(x, ir.GemmLaunch) and x.gemm.folds
    )
    shares = (frozenset(BUCKETS) - chosen, chosen)
    structure = structure_of(tuple(folded))
    counted = sizes_of(tokens)
    return [Share(counted, tuple(dims), buckets, BUCKETS, structure) for buckets in shares]


def _templates(assembly: Assembly) -> list[GemmTemplate]:
    gemms = (x for x in assembly.launches if isinstance(x, ir.GemmLaunch))
    found = (make_template(x) for x in gemms)
    return [with_settings(t) for t in found if t is not None]


def make_tiles(options: Options, device: Device) -> Tiles:
    """Return what chooses tiles on a device, under options and what was tuned there."""
    tuned = load_tuned(device.describe())
    return Tiles(options.schedules, device.target, tuned, options.gemms, options.norms)  # type: ignore[arg-type]
