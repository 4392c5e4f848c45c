"""Print an op of `ir.packed_ops` as Triton: a reduction or running sums per sequence.

In: a `SequenceKernel`. Out: stand-alone source of one function. A program handles one sequence and
some columns, in one pass over the sequence's tokens, whose bounds it reads::

    args: x_ptr, bounds_ptr, out_ptr, before, tokens, after      x (before, tokens, after)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turbotx.ir.matmul_kernels import SequenceKernel
from turbotx.kernels.job import Job
from turbotx.kernels.triton.compiler import POINTEES, fit_warps
from turbotx.kernels.triton.functions import stand_alone
from turbotx.kernels.triton.reduce import TYPES
from turbotx.kernels.triton.specialize import specialize

SEQUENCE_SIZES = ("before", "tokens", "after")


@dataclass(frozen=True)
class SequenceSchedule:
    """Tokens and columns of a tile, and warps."""

    rows: int
    cols: int
    num_warps: int = 4


def choose_sequence_schedule(after: int) -> SequenceSchedule:
    """Return a schedule with tiles of 1,024 elements, for many columns or for one."""
    return SequenceSchedule(8, 128) if after > 1 else SequenceSchedule(1024, 1)


def sequence_job(kernel: SequenceKernel, target: str, schedule: SequenceSchedule) -> Job:
    """Return the job that compiles a kernel for a GPU target."""
    pointers = (
        ("x_ptr", f"*{POINTEES[kernel.dtype]}"), ("bounds_ptr", "*i64"),
        ("out_ptr", f"*{POINTEES[kernel.out]}"),
    )  # fmt: skip
    tiles = (("ROWS", schedule.rows), ("COLS", schedule.cols))
    sizes = tuple((name, "i32") for name in SEQUENCE_SIZES)
    return Job(
        name=kernel.name,
        source=print_triton_sequence(kernel),
        target=target,
        signature=(*pointers, *sizes, *((name, "constexpr") for name, _ in tiles)),
        constexprs=tiles,
        divisible=tuple(name for name, _ in pointers),
        num_warps=fit_warps(schedule.num_warps, target),
    )


def print_triton_sequence(kernel: SequenceKernel) -> str:
    """Return the Triton source of a kernel."""
    wide = kernel.dtype in (torch.float32, torch.float64, torch.int64)
    computed = torch.float32 if kernel.dtype.is_floating_point else torch.int64
    least = None
    if kernel.which == "max" and not kernel.dtype.is_floating_point:
        least = torch.iinfo(kernel.dtype).min
    flags = {
        "WHICH": kernel.which,
        "SUMS": TYPES[kernel.dtype if wide else computed],
        "STORED": TYPES[kernel.out],
        "LEAST": least,
    }
    function = "sequence_cumsum" if kernel.which == "cumsum" else "sequence_reduce"
    arguments = ["x_ptr", "bounds_ptr", "out_ptr", *SEQUENCE_SIZES, "ROWS", "COLS"]
    source = specialize("sequences", function, kernel.name, arguments, flags)
    return stand_alone([kernel.name, f"  {kernel.which} of each sequence"], source)


def sequence_grid(
    kernel: SequenceKernel, schedule: SequenceSchedule, sequences: int, before: int, after: int
) -> tuple[int, int, int]:
    """Return the grid; running sums have one more program, for tokens after the last sequence."""
    programs = sequences + (kernel.which == "cumsum")
    return programs, -(-after // schedule.cols) * before, 1
