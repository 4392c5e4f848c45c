"""Variants: the compiled variant of a kernel that a shape needs, and its grid.

In: a program's launches and its evaluated sizes. Out: per launch a job, printed once per schedule,
and a grid; this takes microseconds, since the binding has evaluated all sizes::

    family.pick(sizes)  ->  [Part("kernel", Job fused_add_layer_norm_0, (40, 1, 1))]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from turbotx import ir
from turbotx.ir.expr import dim, product
from turbotx.ir.matmul_kernels import AttentionKernel, ProductKernel
from turbotx.kernels.attention_jobs import attention_job, product_job
from turbotx.kernels.job import ALIGNED_NBYTES, Job
from turbotx.kernels.schedule import (
    INT32_LIMIT,
    MANY_ROWS,
    PERSISTENT,
    Schedule,
    divisible_sizes,
    is_strided,
    outer_axes,
    power_above,
    vector_axes,
)
from turbotx.kernels.schedule_selector import (
    Tiles,
    attention_neighbours,
    queries_bucket,
    structure_of,
)
from turbotx.kernels.triton.attention import (
    CACHE_POINTERS,
    STRIDES,
    AttentionSchedule,
    attention_grid,
    in_blocks,
    size_names,
    with_keys,
)
from turbotx.kernels.triton.compiler import kernel_job
from turbotx.kernels.triton.products import PRODUCT_NAMES, PRODUCT_STRIDES, product_grid
from turbotx.kernels.triton.sequences import (
    SequenceSchedule,
    choose_sequence_schedule,
    sequence_grid,
    sequence_job,
)
from turbotx.kernels.triton.tags import AttentionTiles, tag_of
from turbotx.kernels.tuned import Choose, neighbours
from turbotx.program.executable import ArgumentLayout
from turbotx.program.link import LaunchLayout
from turbotx.program.steps import GrowingDims
from turbotx.runtime.cuda.parts import Part
from turbotx.runtime.device import Grid

KEYS = ("q_len", "k_len")
POINTERS = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "keys_ptr", "bias_ptr", "sinks_ptr")
# The possible key counts of an attention tile; the last means more than any.
TILES_OF_KEYS = (16, 32, 64, 128, 256, 1 << 30)
# Elements from which kernels use 64-bit offsets; below 2**31, since masked tiles reach past the
# end.
LARGE = INT32_LIMIT - PERSISTENT


def lay_out(
    operands: list[ir.Operand], cell: str, sizes: list[int], table: LaunchLayout
) -> ArgumentLayout:  # fmt: skip
    """Return the layout of arguments: operands, a cell, sizes by their place in the table."""
    pointers = []
    for arg in operands:
        shift = arg.offset * arg.dtype.itemsize
        pointers.append((table.slots[arg.tensor], None if shift == 0 else table.value(shift)))
    return ArgumentLayout(tuple(pointers), cell, tuple(sizes))


# Upper ends of the power-of-two ranges of a length; the last stands for all larger ones.
POWERS = tuple(1 << k for k in range(31))


@dataclass(frozen=True)
class Deciders:
    """The sizes, by index, that decide which variant of a family runs.

    by: the upper ends of the ranges of a size with the same choice, the last for all larger. even:
    sizes of which only divisibility by 16 matters. large: sizes of which only whether one exceeds
    32-bit offsets matters.
    """

    by: tuple[tuple[int, tuple[int, ...]], ...]
    even: tuple[int, ...]
    large: tuple[int, ...] = ()


class KernelFamily:
    """The variants of a generated kernel; equal kernels of several layers share a family."""

    def __init__(
        self, kernel: ir.Kernel, target: str, table: LaunchLayout, choose: Choose,
        steps: GrowingDims | None = None,
    ) -> None:  # fmt: skip
        """Take what grows with every step of a decoder, where that is read on the device."""
        self.kernel, self._target, self._choose = kernel, target, choose
        self._cells = tuple(n for n in kernel.sizes if steps and steps.move(dim(n)))
        self._length = table.value(product([a.extent for a in vector_axes(kernel)]))
        outer = [a.extent for a in outer_axes(kernel)]
        self._outer = table.value(product(outer))
        self.masks_rows = steps is not None and steps.move(*outer)
        """Whether programs are launched for more rows than there are: a graph has one grid."""
        counts = [table.value(product(p.shape)) for p in kernel.params]
        self._counts = [*counts, self._length, self._outer]
        self._strides = [(name, table.value(dim(name))) for name in divisible_sizes(kernel)]
        self._strided = is_strided(kernel)
        self._schedules: dict[tuple[int, bool], Schedule] = {}
        self._jobs: dict[tuple[Schedule, tuple[str, ...]], Job] = {}

    def pick(self, sizes: Sequence[int]) -> list[Part]:
        """Return what to run at these sizes; a grid with a zero means nothing."""
        length = sizes[self._length]
        wide = any(sizes[k] >= LARGE for k in self._counts)
        schedule = self._schedules.get((length, wide))
        if schedule is None:
            schedule = self._choose(self.kernel, length, wide, self._strided)
            self._schedules[length, wide] = schedule
        return self.at(schedule, sizes)

    def expected(self, sizes: Sequence[int]) -> list[Job]:
        """Return the jobs for these sizes with few and with many rows: no further builds are needed
        for other numbers of rows."""
        _, schedule = self.chosen(sizes)
        if not schedule.programs:
            return []
        few = replace(schedule, programs=0)
        return [self._job(s, self._divisible(sizes)) for s in (few, schedule)]

    @property
    def deciders(self) -> Deciders:
        """The deciding sizes: row length by powers of two, number of rows, divisibility of strides
        by 16."""
        strides = tuple(place for _, place in self._strides)
        by = [(self._length, POWERS)]
        if self.kernel.columns and self.kernel.rows:
            by.append((self._outer, (MANY_ROWS, POWERS[-1])))
        return Deciders(tuple(by), strides, tuple(self._counts))

    def at(self, schedule: Schedule, sizes: Sequence[int]) -> list[Part]:
        """Return what to run at these sizes by a given schedule."""
        if self.masks_rows and schedule.rows == 1:  # a tile of one row has no mask
            schedule = replace(schedule, rows=2)
        if schedule.programs and sizes[self._outer] <= MANY_ROWS:
            schedule = replace(schedule, programs=0)
        job = self._job(schedule, self._divisible(sizes))
        grid = self._grid(schedule, sizes[self._length], sizes[self._outer])
        return [Part("kernel", job, grid)]

    def _divisible(self, sizes: Sequence[int]) -> tuple[str, ...]:
        even = (name for name, k in self._strides if sizes[k] % 16 == 0)
        return tuple(name for name in even if name not in self._cells)

    def _job(self, schedule: Schedule, divisible: tuple[str, ...]) -> Job:
        job = self._jobs.get((schedule, divisible))
        if job is None:
            job = kernel_job(self.kernel, self._target, schedule, divisible, self._cells)
            self._jobs[schedule, divisible] = job
        return job

    def chosen(self, sizes: Sequence[int]) -> tuple[int, Schedule]:
        """Return the row length, and the schedule that `pick` uses."""
        self.pick(sizes)
        length = sizes[self._length]
        return length, next(s for (n, _), s in self._schedules.items() if n == length)

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.name

    def structure(self) -> str:
        """Return the key of tuned schedules: the kernel's digest."""
        return self.kernel.digest()

    def neighbours(self, schedule: Schedule, length: int) -> Sequence[Schedule]:
        """Return schedules near one, to try when tuning, at a row length."""
        return neighbours(self.kernel, schedule, length)

    def bucket(self, length: int) -> str:
        """Return the next power of two above a row length, as text."""
        return str(power_above(length))

    def tag(self, schedule: Schedule) -> str:
        """Return a schedule's short name."""
        return schedule.tag

    def _grid(self, schedule: Schedule, length: int, outer: int) -> Grid:
        programs = schedule.count(outer)
        if self.kernel.columns or not self.kernel.axes:
            return programs, 1, 1
        tiles = -(-length // schedule.cols)
        return (tiles, 1, 1) if len(self.kernel.axes) < 2 else (programs, tiles, 1)


class AttentionFamily:
    """The variants of an attention launch, or of one of attention's two products, by the number of
    queries and the divisibility of strides and addresses."""

    def __init__(
        self, launch: ir.AttentionLaunch | ir.ProductLaunch, target: str, table: LaunchLayout,
        tiles: Tiles, steps: GrowingDims | None = None,
    ) -> None:  # fmt: skip
        """Take what grows with every step of a decoder, where that is read on the device."""
        self.kernel: AttentionKernel | ProductKernel = launch.kernel
        self._target, self._tiles = target, tiles
        self._sizes = [table.value(e) for e in launch.sizes]
        if isinstance(launch, ir.AttentionLaunch):
            self._names, self._strides = size_names(launch.kernel), STRIDES
            further = CACHE_POINTERS if launch.kernel.cached else ("bounds_ptr", "starts_ptr")
            names = (*POINTERS, *further)
        else:
            self._names, self._strides = PRODUCT_NAMES, PRODUCT_STRIDES
            names = ("a_ptr", "b_ptr", "out_ptr")
        given = dict(zip(names, launch.operands, strict=False))
        aligned = {n: a for n, a in given.items() if n not in CACHE_POINTERS}
        self._shifts = table.shifts(aligned)
        cells = [n for n, a in given.items() if steps and a is not None and a.tensor == steps.cache]
        sized = zip(self._names, launch.sizes, strict=True)
        self._cells = (*(n for n, e in sized if steps and steps.move(e)), *cells)
        self._chosen: dict[int, AttentionTiles] = {}
        self._jobs: dict[object, Job] = {}

    def pick(self, sizes: Sequence[int]) -> list[Part]:
        """Return what to run at these sizes; a grid with a zero means nothing."""
        return self.at(self.chosen(sizes)[1], sizes)

    def chosen(self, sizes: Sequence[int]) -> tuple[int, AttentionTiles]:
        """Return the bucket of the number of queries, and the schedule that `pick` uses."""
        bucket = queries_bucket(sizes[self._sizes[self._names.index("q_len")]])
        if bucket not in self._chosen:
            self._chosen[bucket] = self._tiles.attention(self.kernel, bucket)
        return bucket, self._chosen[bucket]

    def expected(self, sizes: Sequence[int]) -> list[Job]:
        """Return the jobs for these sizes and any number of keys."""
        tiles, q, k = self.chosen(sizes)[1], *(self._sizes[self._names.index(n)] for n in KEYS)
        found = self.at(tiles, sizes)
        if isinstance(tiles, AttentionSchedule) and tiles.once and q != k:
            found += self.at(replace(tiles, once=0), sizes)
        return [part.job for part in found if isinstance(part.job, Job)]

    @property
    def deciders(self) -> Deciders:
        """The deciding sizes: numbers of queries and keys by range, divisibility of strides by
        16."""
        places = dict(zip(self._names, self._sizes, strict=True))
        even = (*(places[n] for n in self._strides), *(k for _, k in self._shifts))
        by = [(places["q_len"], POWERS)]
        if isinstance(self.kernel, AttentionKernel):  # whether one tile holds all keys
            by.append((places["k_len"], TILES_OF_KEYS))
        return Deciders(tuple(by), even)

    def at(self, tiles: AttentionTiles, sizes: Sequence[int]) -> list[Part]:
        """Return what to run at these sizes by a given schedule."""
        values = dict(zip(self._names, (sizes[k] for k in self._sizes), strict=True))
        if isinstance(tiles, AttentionSchedule):
            cached = isinstance(self.kernel, AttentionKernel) and self.kernel.cached
            tiles = in_blocks(tiles) if cached else with_keys(tiles, values["k_len"])
        key = (tiles, *self._known(values, sizes))
        job = self._jobs.get(key)
        if job is None:
            job = self._jobs[key] = self._make(*key)
        return [Part("kernel", job, self._grid(tiles, values))]

    def _known(
        self, values: Mapping[str, int], sizes: Sequence[int]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the strides that are multiples of 16, and the pointers not aligned to 16 bytes."""
        even = (name for name in self._strides if values[name] % 16 == 0)
        unaligned = tuple(name for name, k in self._shifts if sizes[k] % ALIGNED_NBYTES)
        return tuple(name for name in even if name not in self._cells), unaligned

    def _make(self, tiles: Any, divisible: Iterable[str], unaligned: Iterable[str]) -> Job:
        kernel, given = self.kernel, (self._target, tiles, divisible, unaligned)
        if isinstance(kernel, AttentionKernel):
            return attention_job(kernel, *given, cells=self._cells)
        return product_job(kernel, *given)

    def _grid(self, tiles: AttentionTiles, values: Mapping[str, int]) -> Grid:
        batch, heads, q_len = values["batch"], values["heads"], values["q_len"]
        if isinstance(tiles, AttentionSchedule):
            packed = isinstance(self.kernel, AttentionKernel) and self.kernel.packed
            return attention_grid(tiles, batch, heads, q_len, packed)
        assert isinstance(self.kernel, ProductKernel)
        return product_grid(self.kernel, tiles, batch, heads, q_len, values["k_len"])

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.name

    def structure(self) -> str:
        """Return the key of tuned tiles: the kernel's structure."""
        return structure_of(self.kernel)

    def neighbours(self, tiles: AttentionTiles, bucket: int) -> Sequence[AttentionTiles]:
        """Return tiles near some, to try when tuning."""
        return attention_neighbours(tiles)

    def bucket(self, length: int) -> str:
        """Return the tuning bucket of a number of queries, as text."""
        return str(length)

    def tag(self, tiles: AttentionTiles) -> str:
        """Return the tiles' short name."""
        return tag_of(tiles)


class SequenceFamily:
    """The variants of a launch over each sequence's tokens: one column, and several."""

    def __init__(self, launch: ir.SequenceLaunch, target: str, table: LaunchLayout) -> None:
        self.kernel, self._target = launch.kernel, target
        self._extents = [table.value(e) for e in launch.extents]
        self._jobs: dict[SequenceSchedule, Job] = {}

    def pick(self, sizes: Sequence[int]) -> list[Part]:
        """Return what to run at these sizes; a grid with a zero means nothing."""
        sequences, before, _, after = (sizes[k] for k in self._extents)
        schedule = choose_sequence_schedule(after)
        if schedule not in self._jobs:
            self._jobs[schedule] = sequence_job(self.kernel, self._target, schedule)
        grid = sequence_grid(self.kernel, schedule, sequences, before, after)
        return [Part("kernel", self._jobs[schedule], grid)]

    @property
    def deciders(self) -> Deciders:
        """The deciding size: whether there is more than one column."""
        return Deciders(((self._extents[3], (1, POWERS[-1])),), ())
