"""Dispatch: which calls each specialization of a program serves, by the number of tokens.

In: the same launches with norms stored and with norms folded, a target. Out: for each the buckets
of tokens in which it is to run, decided once, before anything is built::

    choose_ranges([stored, folded], ("batch", "seq"), make_tiles(options, "sm_90"))
        ->  [TokenRange((batch*seq,), {512, 1024, 4096}), TokenRange((batch*seq,), {16, ..., 256})]
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from turbotx.ir.expr import Expr, compile_evaluator
from turbotx.kernels.fusion.epilogue import GemmKernel
from turbotx.kernels.gemm_heuristics import BUCKETS, bucket_of
from turbotx.kernels.schedule_selector import Tiles, structure_of
from turbotx.kernels.triton.gemm_template import GemmTemplate
from turbotx.kernels.tuned import load_tuned
from turbotx.options import Options
from turbotx.program.assemble import Assembly
from turbotx.runtime.cuda.gemm import make_template, with_settings
from turbotx.runtime.state import Evaluate


@dataclass(frozen=True)
class TokenRange:
    """The calls whose largest of some numbers of tokens belongs to one of some buckets.

    structure: under which tuning keeps the choice.
    """

    tokens: tuple[Expr, ...]
    dims: tuple[str, ...]
    buckets: frozenset[int]
    structure: str = ""

    def holds(self, dims: Sequence[int]) -> bool:
        return self.bucket(dims) in self.buckets

    def bucket(self, dims: Sequence[int]) -> int:
        """Return the bucket that decides at these dims."""
        return bucket_of(max(self._evaluate(*dims)))

    def buckets_of(self, tokens: Expr) -> Collection[int]:
        """Return the buckets in which a number of tokens can be, in such a call."""
        return sorted(self.buckets) if self.tokens == (tokens,) else BUCKETS

    @cached_property
    def _evaluate(self) -> Evaluate:
        return compile_evaluator(list(self.tokens), self.dims)


def choose_ranges(
    assemblies: Sequence[Assembly], dims: Sequence[str], tiles: Tiles
) -> list[TokenRange | None]:
    """Return what a program and the one with its norms folded serve on a GPU; None: all calls."""
    if len(assemblies) == 1:
        return [None]
    stored, folded = (_templates(a) for a in assemblies)
    chosen = frozenset(b for b in BUCKETS if tiles.folds(stored, folded, b))
    tokens = dict.fromkeys(
        x.sizes[0]
        for x in assemblies[1].launches
        if isinstance(x.target, GemmKernel) and x.target.folds
    )
    structure = structure_of(tuple(folded))
    served = (frozenset(BUCKETS) - chosen, chosen)
    return [TokenRange(tuple(tokens), tuple(dims), buckets, structure) for buckets in served]


def _templates(assembly: Assembly) -> list[GemmTemplate]:
    gemms = (x for x in assembly.launches if x.kind == "gemm")
    found = (make_template(x) for x in gemms)
    return [with_settings(t) for t in found if t is not None]


def make_tiles(options: Options, target: str, gpu: str = "") -> Tiles:
    """Return what chooses tiles for a target, under options and what was tuned on GPUs of a name,
    as "NVIDIA H100": nothing where there is none."""
    tuned = load_tuned(gpu) if gpu else {}
    return Tiles(options.schedules, target, tuned, options.gemms, options.norms)  # type: ignore[arg-type]
