"""GEMMs of a GPU program: one Triton kernel, or cuBLAS and kernels for the epilogue.

In: a gemm launch with its fallback, and sizes. Out: the parts to queue, by the bucket of tokens::

    linear_gelu_0 at 40 tokens    ->  [gemm_float16_3072x768_bias_gelu on (96, 1)]
    linear_gelu_0 at 4096 tokens  ->  [cuBLAS's addmm into out, fused_add_gelu over it]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from turbotx import ir
from turbotx.ir.expr import ONE, ZERO
from turbotx.ir.matmul_kernels import GemmKernel, RowNorm
from turbotx.kernels.gemm_heuristics import BUCKETS, STRIDES, bucket_of, gemm_job
from turbotx.kernels.job import ALIGNED_NBYTES, Job
from turbotx.kernels.schedule_selector import Tiles, gemm_neighbours, structure_of
from turbotx.kernels.triton.gemm_template import (
    GemmSchedule,
    GemmTemplate,
    gemm_arguments,
    gemm_grid,
)
from turbotx.kernels.triton.tags import tag_of
from turbotx.program.executable import ArgumentLayout, LibraryGemm
from turbotx.program.link import LaunchLayout, plain_window
from turbotx.runtime.cuda.parts import Part
from turbotx.runtime.cuda.settings import uses_tf32
from turbotx.runtime.cuda.variants import Deciders, KernelFamily, lay_out

LIBRARY_CALL = Part("library")
# A template's names of a gemm launch's arguments, in order.
POINTERS = (
    "x_ptr", "w_ptr", "bias_ptr", "out_ptr", "residual_ptr", "sums_ptr", "scales_ptr",
    "x_stats_ptr", "residual_norm_ptr", "residual_stats_ptr", "stats_ptr",
)  # fmt: skip
INT8_POINTERS = (*POINTERS[:5], "scales_ptr", "x_scale_ptr", "stats_ptr")


def make_template(launch: ir.GemmLaunch | ir.GroupedGemmLaunch) -> GemmTemplate | None:
    """Return the Triton template of a gemm launch; None if neither rows nor columns of its weight
    are contiguous."""
    weight, kind = launch.weight, launch.gemm
    int8 = launch.int8 if isinstance(launch, ir.GemmLaunch) else None
    packed = int8 is not None and int8.group > 0  # two int4 values per byte
    k = int((launch.x if packed else weight).shape[-1])
    down, along = weight.strides[-2:]
    grouped = isinstance(launch, ir.GroupedGemmLaunch)
    none = RowNorm("none", 1e-5)
    norm, added = kind.norm or none, kind.residual_norm or none
    by = None if int8 is None else int8.float_rows or int8.x_scale or int8.x_peaks
    assert int8 is None or by, f"{launch.name} is given rows, and nothing to quantise them by"
    if along != 1 and down != 1 and k != 1:
        return None
    return GemmTemplate(
        launch.out.dtype,
        int(launch.width),
        k,
        bias=launch.bias is not None,
        activation=kind.activation,
        gated=kind.gated,
        residual=launch.residual is not None,
        norm=norm.kind,
        eps=norm.eps,
        scaled=launch.norm is not None and launch.norm.scales is not None,
        residual_norm=added.kind,
        residual_eps=added.eps,
        stats=kind.stats,
        flipped=along != 1 and k != 1,
        experts=int(weight.shape[0]) if grouped else 0,
        expert_step=int(weight.strides[0]) if grouped else 0,
        narrow=None if int8 is None else weight.dtype,
        float_rows=int8 is not None and int8.float_rows,
        group=0 if int8 is None else int8.group,
        shifted=int8 is not None and len(int8.weight_scale.shape) == 3,
        quantizes=int8 is not None and int8.x_peaks is not None,
        peaks=int8 is not None and int8.peaks is not None,
    )


class GemmFamily:
    """The variants of a gemm launch; equal launches of several layers share a family.

    finish: the kernels after the library's GEMM. left_by: by the name of a tensor of row statistics
    or row maxima, the template that writes it, or the number of columns per entry.
    """

    def __init__(
        self, launch: ir.GemmLaunch | ir.GroupedGemmLaunch, target: str, table: LaunchLayout,
        tiles: Tiles, finish: Sequence[KernelFamily] = (),
        left_by: Mapping[str, GemmTemplate | int] | None = None,
    ) -> None:  # fmt: skip
        self.template, self.finish = make_template(launch), tuple(finish)
        self._target, self._tiles = target, tiles
        x, weight, residual = launch.x, launch.weight, launch.residual
        norm = launch.norm or ir.NormOperands()
        # Writers of the statistics of x and of the residual; the tile widths are theirs.
        int8 = launch.int8 if isinstance(launch, ir.GemmLaunch) else None
        read = (norm.x_stats if int8 is None else int8.x_peaks, norm.residual_stats)
        self._left_by = [None if a is None else (left_by or {})[a.tensor] for a in read]
        down = weight.strides[-1 if self.template and self.template.flipped else -2]
        sizes = {"tokens": launch.rows, "x_row": launch.x_stride, "w_row": down}
        sizes["out_row"] = launch.width
        if residual is not None:
            sizes["residual_row"] = launch.width
        self._sizes = {name: table.value(e) for name, e in sizes.items()}
        operands = {"x_ptr": x, "w_ptr": weight, "bias_ptr": launch.bias, "residual_ptr": residual}
        if self.template is not None and self.template.narrow is not None:
            operands |= zip(INT8_POINTERS[5:], launch.operands[5:], strict=False)
        self._shifts = table.shifts(operands)
        self._chosen: dict[tuple[GemmTemplate, int], GemmSchedule | None] = {}
        self._jobs: dict[object, Job] = {}

    @property
    def key(self) -> object:
        """A key that is equal for launches that can share a family."""
        return (
            self.template, tuple(self._sizes.values()), tuple(self._shifts),
            tuple(id(f) for f in self.finish), tuple(self._left_by),
        )  # fmt: skip

    def layouts(self, launch: ir.GemmLaunch, table: LaunchLayout) -> dict[str, ArgumentLayout]:
        """Return the argument layouts of the template, with and without split-K."""
        if self.template is None:
            return {}
        names = POINTERS if launch.int8 is None else INT8_POINTERS
        tensors = dict(zip(names, launch.operands, strict=False))
        given = gemm_arguments(self.template, GemmSchedule(16, 16, 16))
        operands = [tensors[a] for a, kind in given if kind != "size"]
        sizes = [self._sizes[a] for a, kind in given if kind == "size"]
        plain = lay_out([a for a in operands if a is not None], "", sizes, table)
        sums = (table.slots[launch.workspaces[0]], None)
        split = replace(plain, pointers=(*plain.pointers, sums), cell="turns")
        return {"gemm": plain, "split": split}

    def pick(self, sizes: Sequence[int]) -> list[Part]:
        """Return the parts to queue at these sizes."""
        return self.at(self.chosen(sizes)[1], sizes)

    def chosen(self, sizes: Sequence[int]) -> tuple[int, GemmSchedule | None]:
        """Return the bucket of tokens, and the schedule that `pick` uses, None for the library."""
        bucket, template = bucket_of(sizes[self._sizes["tokens"]]), self._typed()
        if template is None:
            return bucket, None
        key = (template, bucket)
        if key not in self._chosen:
            self._chosen[key] = self._tiles.gemm(template, bucket)
        return bucket, self._chosen[key]

    @property
    def tokens(self) -> int:
        """The index of the number of tokens in a program's sizes."""
        return self._sizes["tokens"]

    @property
    def deciders(self) -> Deciders:
        """The deciding sizes of the template and of the kernels after the library's GEMM."""
        behind = [family.deciders for family in self.finish]
        even = (
            *(self._sizes[n] for n in STRIDES if n in self._sizes),
            *(k for _, k in self._shifts),
        )
        return Deciders(
            ((self.tokens, BUCKETS), *(by for d in behind for by in d.by)),
            (*even, *(k for d in behind for k in d.even)),
            tuple(k for d in behind for k in d.large),
        )

    def expected(self, sizes: Sequence[int], buckets: Iterable[int] = BUCKETS) -> list[Job]:
        """Return the jobs of all buckets, and of the kernels after the library's GEMM for any
        number of rows: no sequence of lengths needs more builds."""
        tokens = self.tokens
        found = [job for family in self.finish for job in family.expected(sizes)]
        for bucket in buckets:
            parts = self.pick([*sizes[:tokens], bucket, *sizes[tokens + 1 :]])
            found += [
                p.job for p in parts if p.which in ("gemm", "split") and isinstance(p.job, Job)
            ]
        return found

    def at(self, schedule: GemmSchedule | None, sizes: Sequence[int]) -> list[Part]:
        """Return the parts to queue at these sizes with a given schedule."""
        template, tokens = self._typed(), sizes[self._sizes["tokens"]]
        if schedule is None or template is None:
            finish = [p for family in self.finish for p in family.pick(sizes)]
            return [LIBRARY_CALL, *(replace(p, which=f"end{k}") for k, p in enumerate(finish))]
        schedule = self._with_statistics(schedule, tokens)
        divisible = tuple(n for n in STRIDES if n in self._sizes and self._even(n, sizes))
        unaligned = tuple(name for name, k in self._shifts if sizes[k] % ALIGNED_NBYTES)
        key = (template, schedule, divisible, unaligned)
        job = self._jobs.get(key)
        if job is None:
            job = gemm_job(template, self._target, schedule, divisible, unaligned)
            self._jobs[key] = job
        which = "gemm" if schedule.splits == 1 else "split"
        return [Part(which, job, gemm_grid(template, schedule, tokens))]

    def _with_statistics(self, schedule: GemmSchedule, tokens: int) -> GemmSchedule:
        """Return the schedule with the tile widths of the statistics that it reads."""
        widths = [0, 0]
        for k, template in enumerate(self._left_by):
            if isinstance(template, GemmTemplate):
                made = self._tiles.gemm(with_settings(template), tokens)
                assert made is not None
                widths[k] = made.n_tile
            elif template is not None:
                widths[k] = template
        return replace(schedule, stat_tile=widths[0], residual_tile=widths[1])

    def _even(self, name: str, sizes: Sequence[int]) -> bool:
        return sizes[self._sizes[name]] % 16 == 0

    def _typed(self) -> GemmTemplate | None:
        """Return the template with PyTorch's current TF32 setting."""
        return None if self.template is None else with_settings(self.template)

    # --- tuning ---

    @property
    def name(self) -> str:
        """The template's name, "" if only the library can run the product."""
        return self.template.name if self.template is not None else ""

    def structure(self) -> str:
        """Return the key of tuned schedules: the template's digest, "" for the library."""
        template = self._typed()
        return "" if template is None else structure_of(template)

    def neighbours(self, schedule: GemmSchedule | None, bucket: int) -> Sequence[object]:
        """Return schedules near one, to try when tuning, for a bucket of tokens."""
        template = self._typed()
        if template is None:
            return []
        return gemm_neighbours(template, schedule, bucket, self._target)

    def bucket(self, length: int) -> str:
        """Return the tuning bucket of a number of tokens, as text."""
        return str(length)

    def tag(self, schedule: GemmSchedule | None) -> str:
        """Return a schedule's short name, "cublas" for the library."""
        return tag_of(schedule)


def with_settings(template: GemmTemplate) -> GemmTemplate:
    """Return a template with PyTorch's current TF32 setting."""
    exact = template.dtype is torch.float32 and template.kind == "none"
    return replace(template, tf32=uses_tf32()) if exact else template


def plain_gemm(launch: ir.GemmLaunch, fixed: bool) -> LibraryGemm:
    """Return a launch's library call on 2-d rows. fixed: the call may be cached."""
    x, out, rows, width = launch.x, launch.out, launch.rows, launch.width
    given = ir.Operand(x.tensor, x.dtype, (rows, x.shape[-1]), (launch.x_stride, ONE), x.offset)
    target = ir.Operand(out.tensor, out.dtype, (rows, width), (width, ONE), ZERO)
    bias = None if launch.bias is None else plain_window(launch.bias)
    windows = (plain_window(given), plain_window(launch.weight), bias, plain_window(target))
    return LibraryGemm(*windows, relu=launch.gemm.activation == "relu", fixed=fixed)


def find_library_call(
    launch: ir.GemmLaunch,
) -> tuple[ir.GemmLaunch, tuple[ir.KernelLaunch, ...]]:
    """Return the launch of the library's GEMM and the kernels after it; the launch itself if a norm
    is folded into it, which no library supports."""
    relu = launch.gemm == GemmKernel("relu")
    if launch.fallback is None or (relu and launch.bias is not None and launch.residual is None):
        return launch, ()
    return launch.fallback.gemm, launch.fallback.ends
