"""Schedule: the tiling of a kernel's loops for a GPU.

In: an `ir.Kernel`, and dims for loops whose length is known only at run time. Out: a `Schedule`,
one of a handful for all shapes: lengths are run-time arguments, and tiles come from a few sizes.
For a LayerNorm over 768 columns, and for a softmax over `seq` = 300 of them::

    Schedule(rows=1, cols=1024, num_warps=4)    Schedule(rows=1, cols=512, num_warps=4)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import sympy

from turbotx import ir
from turbotx.ir.expr import Expr, evaluate, product
from turbotx.kernels.heuristics import DEFAULT, Heuristics

# Tiles for rows of run-time length: five builds and the looped one.
ROW_TILES = (64, 256, 1024, 4096, 16384)
PERSISTENT = ROW_TILES[-1]
INT32_LIMIT = 2**31
# Rows above which a program may process several tiles. Below, the loop costs more than it saves:
# 0.7 us of each of BERT-base's norms (H200, 40 and 4,096 rows).
MANY_ROWS = 65536


@dataclass(frozen=True)
class Schedule:
    """A tile of `rows` x `cols` elements per program.

    looped: the program loops over its row, `cols` at a time, instead of keeping it in registers.
    wide: 64-bit offsets. programs: about the most programs, each looping over tiles; 0: one tile
    per program.
    """

    rows: int
    cols: int
    num_warps: int = 4
    looped: bool = False
    wide: bool = False
    programs: int = 0

    @property
    def tag(self) -> str:
        """A short name for files and tables: `r1c1024w4`, with l for looped and x for wide."""
        most = f"p{self.programs}" if self.programs else ""
        tile = f"r{self.rows}c{self.cols}w{self.num_warps}{most}"
        return tile + "l" * self.looped + "x" * self.wide

    def count(self, rows: int) -> int:
        """Return the number of programs for `rows`, at most `programs`, with evenly distributed
        tiles."""
        tiles = -(-rows // self.rows)
        return -(-tiles // (1 + tiles // self.programs)) if self.programs else tiles


def vector_axes(kernel: ir.Kernel) -> tuple[ir.Axis, ...]:
    """Return the axes of a tile's columns: the reduced ones, otherwise the innermost axis."""
    return kernel.columns or kernel.axes[-1:]


def outer_axes(kernel: ir.Kernel) -> tuple[ir.Axis, ...]:
    """Return the axes of a tile's rows, outermost first."""
    return kernel.rows if kernel.columns else kernel.axes[:-1]


def choose_schedule(kernel: ir.Kernel, dims: Mapping[str, int] | None = None) -> Schedule:
    """Return the schedule for a kernel at `dims`; None: for medium run-time lengths."""
    wide = dims is not None and needs_wide(kernel, dims)
    return schedule_for(kernel, _length(kernel, dims), wide, is_strided(kernel))


def schedule_for(
    kernel: ir.Kernel, length: int, wide: bool, strided: bool, numbers: Heuristics = DEFAULT
) -> Schedule:
    """Return the schedule for a kernel with rows of `length` columns."""
    choose = _reduction if kernel.columns else _pointwise
    return replace(choose(kernel, length, strided, numbers), wide=wide)


def _length(kernel: ir.Kernel, dims: Mapping[str, int] | None) -> int:
    extent = product([a.extent for a in vector_axes(kernel)])
    if extent.is_Integer:
        return int(extent)
    return 1024 if dims is None else evaluate(extent, dims)


def is_static(kernel: ir.Kernel) -> bool:
    """Return whether the length of the kernel's rows is known before it runs."""
    return bool(product([a.extent for a in vector_axes(kernel)]).is_Integer)


def _reduction(kernel: ir.Kernel, length: int, strided: bool, numbers: Heuristics) -> Schedule:
    side = numbers.strided
    if strided:
        looped = length > 2 * side
        cols = side if looped else power_above(length)
        return Schedule(side, cols, _warps(side * cols, numbers), looped)
    if length > numbers.persistent:
        return Schedule(1, numbers.loop_tile, 8, looped=True)
    cols = power_above(length)
    if not is_static(kernel):
        cols = next(t for t in ROW_TILES if t >= length)
    narrowest = min(
        (p.dtype.itemsize for p in kernel.params if p.dtype.is_floating_point), default=4
    )
    rows = max(1, numbers.row_nbytes // narrowest // cols) if kernel.rows else 1
    # A longer row's program moves enough bytes to amortize its start.
    short = rows * cols * narrowest <= numbers.row_nbytes
    programs = numbers.programs if kernel.rows and short else 0
    return Schedule(rows, cols, _row_warps(rows * cols, numbers), programs=programs)


def _pointwise(kernel: ir.Kernel, length: int, strided: bool, numbers: Heuristics) -> Schedule:
    tile, side = numbers.pointwise_tile, numbers.strided
    if sum(isinstance(s, ir.Compute) and s.op in ("sin", "cos") for s in kernel.body) > 1:
        # The exact argument reduction of sine and cosine needs many registers: two of them at
        # eight elements per thread spilled two words on sm_90 and sm_100, four on sm_80 too.
        tile = min(tile, 512)
    if len(kernel.axes) < 2:
        cols = tile if not is_static(kernel) else min(power_above(length), tile)
        return Schedule(1, cols, _warps(cols, numbers))
    if strided:
        cols = min(power_above(length), side) if is_static(kernel) else side
        return Schedule(side, cols, 4)
    if not is_static(kernel):
        cols = tile // 4
    else:
        cols = min(power_above(length), tile)
        while length % cols and cols > 128:
            cols //= 2  # 768 columns are three exact tiles of 256
        if length % cols:
            cols = min(power_above(length), tile)
    rows = max(1, tile // cols)
    return Schedule(rows, cols, _warps(rows * cols, numbers))


def _row_warps(elements: int, numbers: Heuristics) -> int:
    """Return the warps for `row_elements` elements per thread of reduced rows."""
    if not numbers.row_elements:
        return _warps(elements, numbers)
    return min(16, max(1, elements // (32 * numbers.row_elements)))


def _warps(elements: int, numbers: Heuristics) -> int:
    """Return the warps, 4 to 16, for eight elements per thread, or sixteen for large tiles."""
    if elements <= numbers.few:
        return 4
    return 8 if elements <= numbers.many else 16


def power_above(length: int) -> int:
    """Return the smallest power of two that is at least `length`."""
    return 1 << max(0, length - 1).bit_length()


def is_strided(kernel: ir.Kernel) -> bool:
    """Return whether most tensors are contiguous along the rows instead of the columns."""
    columns, rows = vector_axes(kernel), outer_axes(kernel)
    if not columns or not rows:
        return False
    along = {"rows": 0, "columns": 0}
    for s in kernel.body:
        if isinstance(s, (ir.Load, ir.Store)):
            steps = [s.access.stride(a) for a in (rows[-1], columns[-1])]
            if all(step is not None and step != 0 for step in steps):
                along["rows"] += steps[0] == 1
                along["columns"] += steps[1] == 1
    return along["rows"] > along["columns"]


def needs_wide(kernel: ir.Kernel, dims: Mapping[str, int]) -> bool:
    """Return whether an offset or a loop position can pass 2**31 at these dims."""
    sizes: list[Expr] = [product(p.shape) for p in kernel.params]
    sizes.append(product([a.extent for a in outer_axes(kernel)]))
    sizes.append(product([a.extent for a in vector_axes(kernel)]))
    # A masked tile exceeds the end by less than a tile.
    return any(evaluate(size, dims) >= INT32_LIMIT - PERSISTENT for size in sizes)


def grid(kernel: ir.Kernel, schedule: Schedule, dims: Mapping[str, int]) -> tuple[int, int, int]:
    """Return the number of programs along the rows (x) and along the columns (y)."""
    rows = evaluate(product([a.extent for a in outer_axes(kernel)]), dims)
    x = schedule.count(rows)
    if kernel.columns or not kernel.axes:
        return x, 1, 1
    cols = evaluate(product([a.extent for a in vector_axes(kernel)]), dims)
    tiles = -(-cols // schedule.cols)
    return (tiles, 1, 1) if len(kernel.axes) < 2 else (x, tiles, 1)


def tiles_columns(kernel: ir.Kernel, schedule: Schedule) -> bool:
    """Return whether a pointwise kernel's rows may need several tiles."""
    if kernel.columns or not kernel.axes:
        return False
    extent = product([a.extent for a in vector_axes(kernel)])
    return not (extent.is_Integer and int(extent) <= schedule.cols)


def divisible_sizes(kernel: ir.Kernel) -> tuple[str, ...]:
    """Return the size arguments that are strides: if such a size is a multiple of 16, a specialized
    build can use 128-bit loads."""
    found: set[str] = set()
    for s in kernel.body:
        if isinstance(s, (ir.Load, ir.Store)):
            for term in sympy.Add.make_args(sympy.expand(s.access.offset)):
                found |= {x.name for x in term.free_symbols if x.name[0] not in "@%"}
    return tuple(sorted(found))
