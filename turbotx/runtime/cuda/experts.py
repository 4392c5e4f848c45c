"""Mixture of experts on a GPU: variants of grouped products and of the routing launch.

In: these launches and evaluated sizes. Out: the same as `GemmFamily`. No size is read back from the
device, so the grid has as many programs as there can be tiles::

    ExpertsFamily(launch, "sm_90", table, tiles).pick(sizes)  ->  [Part("gemm", Job ..., (9, 4, 1))]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from turbotx import ir
from turbotx.kernels.gemm_heuristics import BUCKETS, bucket_of
from turbotx.kernels.job import Job
from turbotx.kernels.schedule_selector import gemm_neighbours
from turbotx.kernels.triton.experts import route_job
from turbotx.kernels.triton.gemm_template import GemmSchedule, gemm_arguments
from turbotx.program.executable import ArgumentLayout
from turbotx.program.link import LaunchLayout
from turbotx.runtime.cuda.gemm import GemmFamily
from turbotx.runtime.cuda.parts import Part
from turbotx.runtime.cuda.variants import Deciders, lay_out


class ExpertsFamily(GemmFamily):
    """Variants of a grouped product; tiles are chosen by the mean number of rows per expert."""

    def layouts(self, launch: ir.Launch, table: LaunchLayout) -> dict[str, ArgumentLayout]:
        """Return the argument layouts: x, weights, out, ends, and a status word for invalid
        ends."""
        assert isinstance(launch, ir.GroupedGemmLaunch) and self.template is not None
        given = gemm_arguments(self.template, GemmSchedule(16, 16, 16))
        sizes = [self._sizes[a] for a, kind in given if kind == "size"]
        operands = [launch.x, launch.weight, launch.out, launch.ends]
        return {"gemm": lay_out(operands, "status", sizes, table)}

    def chosen(self, sizes: Sequence[int]) -> tuple[int, GemmSchedule | None]:
        """Return the bucket of rows per expert, and the schedule that `pick` uses."""
        template = self._typed()
        assert template is not None
        bucket = bucket_of(-(-sizes[self.tokens] // template.experts))
        key = (template, bucket)
        if key not in self._chosen:
            self._chosen[key] = self._tiles.experts(template, bucket)
        return bucket, self._chosen[key]

    @property
    def deciders(self) -> Deciders:
        """The deciding sizes: the number of rows, by the buckets of rows per expert and by grid."""
        assert self.template is not None
        most = tuple(self.template.experts * rows for rows in (1, *BUCKETS))
        return Deciders(((self.tokens, most),), super().deciders.even)

    def expected(self, sizes: Sequence[int], buckets: Iterable[int] = BUCKETS) -> list[Job]:
        """Return the jobs for any number of rows."""
        assert self.template is not None
        found, at = [], self.tokens
        for each in BUCKETS:
            rows = each * self.template.experts
            found += [p.job for p in self.pick([*sizes[:at], rows, *sizes[at + 1 :]])]
        return [job for job in found if isinstance(job, Job)]

    def neighbours(self, schedule: GemmSchedule | None, bucket: int) -> Sequence[object]:
        """Return schedules near one, to try when tuning, for a bucket of rows per expert."""
        template = self._typed()
        assert template is not None
        near = gemm_neighbours(template, schedule, bucket, self._target)
        return [s for s in near if s is not None and s.splits == 1 and not s.prefetch]


class RouteFamily:
    """The only variant of the launch that sorts rows by expert: one program per expert."""

    def __init__(self, launch: ir.RouteLaunch, target: str, table: LaunchLayout) -> None:
        self._experts = int(launch.ends.shape[0])
        self._job = route_job(target)

    def pick(self, sizes: Sequence[int]) -> list[Part]:
        """Return what to queue at these sizes."""
        return [Part("kernel", self._job, (self._experts, 1, 1))]

    @property
    def deciders(self) -> Deciders:
        """No size decides: there is one variant."""
        return Deciders((), ())
