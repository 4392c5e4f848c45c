"""Schedules: tiles that fit, a bounded number of them, rows in registers up to 16384 elements."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from turbotx import ir
from turbotx.ir.expr import Expr, dim
from turbotx.kernels.heuristics import DEFAULT
from turbotx.kernels.schedule import (
    PERSISTENT,
    ROW_TILES,
    Schedule,
    choose_schedule,
    divisible_sizes,
    grid,
    is_strided,
    needs_wide,
    power_above,
)

F32 = torch.float32
ROWS, N = dim("rows"), dim("n")


def kernel(length: Expr | int, reduced: bool = True, across: bool = False) -> ir.Kernel:
    """y[row] = sum of x[row, :] (or y = x); `across` puts neighbours along the rows."""
    length = ROWS * 0 + length
    axes = (ir.Axis("row", ROWS), ir.Axis("col", length, ir.REDUCTION if reduced else ir.PARALLEL))
    row, col = (a.symbol for a in axes)
    place = col * ROWS + row if across else row * length + col
    shape = (length, ROWS) if across else (ROWS, length)
    end: list[ir.Statement] = [ir.Store(ir.Access("y", place), "x0")]
    if reduced:
        end = [ir.Reduce(("t",), "sum", ("x0",), F32), ir.Store(ir.Access("y", row), "t")]
    params = (
        ir.Param("x", F32, shape, "in"),
        ir.Param("y", F32, (ROWS,) if reduced else shape, "out"),
    )
    body = (ir.Load("x0", ir.Access("x", place), F32), *end)
    return ir.Kernel("k", params, axes, body)


@pytest.mark.parametrize("length", [1, 2, 31, 33, 384, 768, 1000, 4096, 4097, PERSISTENT])
def test_rows_stay_in_registers(length: int) -> None:
    s = choose_schedule(kernel(length))
    assert not s.looped
    assert length <= s.cols == power_above(length)
    assert s.rows * s.cols <= 32 * 32 * s.num_warps, "32 elements a thread at most"


@pytest.mark.parametrize("length", [PERSISTENT + 1, 70000, 10**7])
def test_longer_rows_are_walked_along(length: int) -> None:
    assert choose_schedule(kernel(length)) == Schedule(1, DEFAULT.loop_tile, 8, looped=True)


def test_short_rows_share_a_program() -> None:
    assert choose_schedule(kernel(32)).rows == 16
    assert choose_schedule(kernel(512)).rows == 1


def test_any_length_needs_a_handful_of_schedules() -> None:
    lengths = [*range(1, 2000), *range(2000, 200000, 997)]
    found = {choose_schedule(kernel(N), {"n": n, "rows": 3}) for n in lengths}
    assert len(found) == len(ROW_TILES) + 1
    assert (
        len({choose_schedule(kernel(N, reduced=False), {"n": n, "rows": 3}) for n in lengths}) == 1
    )


@pytest.mark.parametrize(("length", "cols"), [(768, 256), (3072, 1024), (384, 128), (100, 128)])
def test_pointwise_tiles_divide_the_width_where_they_can(length: int, cols: int) -> None:
    s = choose_schedule(kernel(length, reduced=False))
    assert s.cols == cols
    assert s.rows * s.cols == 1024


def test_several_sines_take_a_smaller_tile() -> None:
    plain = kernel(768, reduced=False)
    sines = [ir.Compute(f"s{n}", "sin", ("x0",), F32) for n in range(4)]
    for count, elements in ((1, 1024), (2, 512), (4, 512)):
        body = (plain.body[0], *sines[:count], plain.body[-1])
        s = choose_schedule(dataclasses.replace(plain, body=body))
        assert s.rows * s.cols == elements


def test_neighbours_along_the_rows_get_a_square_tile() -> None:
    assert is_strided(kernel(1000, across=True))
    assert not is_strided(kernel(1000))
    s = choose_schedule(kernel(1000, across=True))
    assert s.looped and s.rows == s.cols == 32


def test_grid_covers_everything_once() -> None:
    k = kernel(768, reduced=False)
    s = choose_schedule(k)
    for rows in (1, 3, 4, 5):
        x, y, z = grid(k, s, {"rows": rows})
        assert (x - 1) * s.rows < rows <= x * s.rows
        assert (y * s.cols, z) == (768, 1)
    assert grid(kernel(768), choose_schedule(kernel(768)), {"rows": 7}) == (7, 1, 1)


def test_offsets_past_31_bits_are_wide() -> None:
    assert not needs_wide(kernel(1024), {"rows": 2**20})
    assert needs_wide(kernel(1024), {"rows": 2**21})
    assert choose_schedule(kernel(1024), {"rows": 2**21}).wide


def test_sizes_in_strides_may_be_declared_divisible() -> None:
    assert divisible_sizes(kernel(N)) == ("n",)
    assert divisible_sizes(kernel(384)) == ()


@pytest.mark.parametrize("rows", [0, 1, 7, 32767, 32768, 40000, 10**7])
@pytest.mark.parametrize("tile", [1, 4])
def test_many_rows_are_shared_by_few_programs(rows: int, tile: int) -> None:
    shared = Schedule(tile, 1024, programs=32768)
    tiles, programs = -(-rows // tile), shared.count(rows)
    assert Schedule(tile, 1024).count(rows) == tiles
    assert programs == tiles if tiles < 32768 else 16384 <= programs <= 32768
    assert programs == 0 if rows == 0 else max(1, tiles // programs) * programs <= tiles
