"""Variants of decoding steps: split attention over the cache, which also appends new rows.

In: launches over a cache, and the dims that grow with each step. Out: as in `variants`, for the
cache's capacity; kernels read its length from device memory::

    family.pick(sizes)  ->  [Part("split", Job split_attention_f16_64_late_causal, (16, 8, 1))]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from turbotx import ir
from turbotx.ir.matmul_kernels import AttentionKernel
from turbotx.kernels.cache_jobs import SplitSchedule, choose_split, split_bounds, split_job
from turbotx.kernels.job import Job
from turbotx.kernels.schedule_selector import Tiles
from turbotx.program.executable import ArgumentLayout
from turbotx.program.link import LaunchLayout
from turbotx.program.steps import GrowingDims
from turbotx.runtime.cuda.parts import Part
from turbotx.runtime.cuda.variants import POWERS, AttentionFamily, Deciders, lay_out


class SplitFamily(AttentionFamily):
    """Variants of attention over a cache; few queries are split over many programs per key head."""

    def __init__(
        self, launch: ir.AttentionLaunch, target: str, table: LaunchLayout, tiles: Tiles,
        steps: GrowingDims,
    ) -> None:  # fmt: skip
        super().__init__(launch, target, table, tiles, steps)
        self._kv_heads = int(launch.sizes[2])
        self._group = int(launch.sizes[1]) // self._kv_heads
        self._splits: dict[object, Job] = {}

    def layout(self, launch: ir.AttentionLaunch, table: LaunchLayout) -> ArgumentLayout:
        """Return the argument layout of split attention."""
        given = [a for a in launch.operands if a is not None]
        plain = lay_out(given, "turns", self._sizes, table)
        sums = (table.slots[launch.workspaces[0]], None)
        return ArgumentLayout((*plain.pointers, sums), "turns", plain.sizes)

    def pick(self, sizes: Sequence[int]) -> list[Part]:
        """Return the parts to run at these sizes; a grid with a zero is skipped."""
        assert isinstance(self.kernel, AttentionKernel)
        values = dict(zip(self._names, (sizes[k] for k in self._sizes), strict=True))
        batch, kv_heads = values["batch"], self._kv_heads
        schedule = choose_split(
            self.kernel, self._group, batch, kv_heads, values["q_len"], values["k_len"]
        )
        if schedule is None:
            return super().pick(sizes)
        job = self._split(schedule, *self._known(values, sizes))
        which = "split" if schedule.parts > 1 else "kernel"
        return [Part(which, job, (schedule.parts, kv_heads, batch))]

    @property
    def deciders(self) -> Deciders:
        """The deciding sizes: those of attention, and the numbers of sequences and queries."""
        found = super().deciders
        places = dict(zip(self._names, self._sizes, strict=True))
        queries, batches = split_bounds(self._group, self._kv_heads)
        own = ((places["q_len"], queries), (places["batch"], (*batches, POWERS[-1])))
        return replace(found, by=(*found.by, *own))

    def _split(
        self, schedule: SplitSchedule, divisible: tuple[str, ...], unaligned: tuple[str, ...]
    ) -> Job:
        assert isinstance(self.kernel, AttentionKernel)
        form = (schedule.q_tile, schedule.rows, schedule.parts > 1, schedule.added)
        key = (form, divisible, unaligned)
        job = self._splits.get(key)
        if job is None:
            job = self._splits[key] = split_job(
                self.kernel, self._group, self._target, schedule, divisible, unaligned, self._cells
            )
        return job
