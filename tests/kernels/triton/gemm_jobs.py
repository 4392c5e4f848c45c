"""Jobs of GEMMs for tests: a template's kernel at a number of tokens, in the heuristics' tiles.

In: a `GemmTemplate`, tokens, a target. Out: the `Job` that builds it::

    build([job_of(template, 40, "sm_90")])
"""

from __future__ import annotations

from dataclasses import replace

from turbotx.kernels.gemm_heuristics import STRIDES, choose_tiles, gemm_job
from turbotx.kernels.job import Job
from turbotx.kernels.triton.gemm_template import GemmSchedule, GemmTemplate


def job_of(
    template: GemmTemplate, tokens: int, target: str, schedule: GemmSchedule | None = None,
    stat_tile: int = 0,
) -> Job:  # fmt: skip
    """stat_tile: columns of a statistic of the rows that a norm reads, the whole row by default."""
    schedule = schedule or choose_tiles(template, tokens, target)
    if template.norm != "none":
        schedule = replace(schedule, stat_tile=stat_tile or template.k)
    if template.residual_norm != "none":
        schedule = replace(schedule, residual_tile=stat_tile or template.n)
    return gemm_job(template, target, schedule, STRIDES)
