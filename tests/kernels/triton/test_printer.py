"""Printed Triton against float64, in Triton's interpreter, over every kind of kernel.

In: functions of tensors, captured and fused as a model is. Out: the printed kernels' results
beside the kernels' own meaning in float64, with PyTorch's own error as the measure.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.compiled_functions import Compilation, by_interpreter, compile_function
from tests.kernel_interpreter import CheckFailed, interpret
from tests.kernels.fusion.test_fuse import grouped_rotary
from tests.kernels.triton.triton_runner import TritonRunner
from turbotx import ir
from turbotx.ir.expr import dim
from turbotx.kernels.schedule import Schedule, choose_schedule
from turbotx.kernels.triton.compiler import build, kernel_job
from turbotx.kernels.triton.printer import print_triton
from turbotx.kernels.triton.text import wrap

F = torch.nn.functional
WEIGHT = torch.randn(12, generator=torch.Generator().manual_seed(0))

# The interpreter takes 0.2 ms for each element that a tuple reduction combines: small tiles.
NARROW = Schedule(1, 16)
SEVERAL = Schedule(4, 16)
LOOPED = Schedule(1, 4, looped=True)
SEVERAL_LOOPED = Schedule(2, 4, looped=True)
SCHEDULES = [NARROW, SEVERAL, LOOPED, SEVERAL_LOOPED]


def same(got: torch.Tensor, exact: torch.Tensor, own: torch.Tensor) -> None:
    """Assert that `got` is as near to `exact` as PyTorch's `own` is, NaN in the same places."""
    assert got.dtype == own.dtype
    assert (got.isnan() == own.isnan()).all()
    if not got.dtype.is_floating_point:
        assert torch.equal(got, own)
        return
    close = own.isfinite()
    assert torch.equal(got[~close].nan_to_num(0), own[~close].nan_to_num(0))
    eps = torch.finfo(got.dtype).eps
    error = (got.double() - exact)[close].abs()
    allowed = 2 * (own.double() - exact)[close].abs().max() if close.any() else 0
    assert (error <= allowed + 8 * eps * exact[close].abs().clamp(min=1)).all()


@functools.cache
def compiled(function: Any, inputs: tuple[torch.Tensor, ...]) -> Compilation:
    return compile_function(function, *inputs)


def check(function: Any, *inputs: torch.Tensor, schedule: Schedule | None = None) -> None:
    made = compiled(function, inputs)
    assert made.kernels
    with torch.no_grad():
        own = function(*inputs)
        wide = [t.double() if t.is_floating_point() else t for t in inputs]
        exact = made.run(wide, by_interpreter)
    own = own if isinstance(own, tuple) else (own,)
    got = made.run(inputs, TritonRunner(schedule))
    for g, e, o in zip(got, exact, own, strict=True):
        same(g, e.double(), o)


ROWS = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
REDUCTIONS = {
    "layer_norm": lambda x: F.layer_norm(x, (12,), WEIGHT, WEIGHT),
    "rms_norm": lambda x: F.rms_norm(x, (12,), WEIGHT),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "var": lambda x: x.var(-1),
    "sum": lambda x: x.sum(-1) * 2,
    "prod": lambda x: x.prod(-1),
    "largest and smallest": lambda x: x.amax(-1) - x.amin(-1),
    "any": lambda x: (x > 0).any(-1),
    "all": lambda x: (x > -1).all(-1),
    "softmax of a norm": lambda x: F.layer_norm(x, (12,)).softmax(-1),
    "whole numbers": lambda x: (x * 9).long().sum(-1),
    "norm": lambda x: x.norm(dim=-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "argmax": lambda x: x.argmax(-1),
    "running sum": lambda x: (x + 1).cumsum(-1) * 2,
    "running product of a softmax": lambda x: (x.softmax(-1) * 9).cumprod(-1),
    "running count": lambda x: (x > 0).cumsum(-1),
}


@pytest.mark.parametrize("schedule", [SEVERAL, LOOPED], ids=lambda s: s.tag)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name: str, schedule: Schedule) -> None:
    check(REDUCTIONS[name], ROWS, schedule=schedule)


@pytest.mark.parametrize("schedule", [NARROW, SEVERAL_LOOPED], ids=lambda s: s.tag)
@pytest.mark.parametrize("name", ["layer_norm", "log_softmax"])
def test_other_tiles(name: str, schedule: Schedule) -> None:
    check(REDUCTIONS[name], ROWS, schedule=schedule)


@pytest.mark.parametrize("length", [2, 3, 31, 33])
@pytest.mark.parametrize(
    "schedule", [Schedule(1, 64), Schedule(1, 8, looped=True)], ids=lambda s: s.tag
)
def test_run_time_lengths(length: int, schedule: Schedule) -> None:
    check(lambda x: (x * 3).softmax(-1), torch.randn(2, length), schedule=schedule)


@pytest.mark.parametrize("schedule", [NARROW, LOOPED], ids=lambda s: s.tag)
def test_mean_far_from_zero(schedule: Schedule) -> None:
    """Mean 1e4, deviation 1: E[x²] - E[x]² would lose every digit of the variance in float32."""
    x = torch.randn(2, 12) + 1e4
    made = compile_function(lambda x: F.layer_norm(x, (12,), WEIGHT), x)
    (got,) = made.run((x,), TritonRunner(schedule))
    exact = F.layer_norm(x.double(), (12,), WEIGHT.double())
    # Neighbouring float32 numbers at 1e4 are 1e-3 apart: a few roundings of the mean.
    assert (got - exact).abs().max() < 6e-3


@pytest.mark.parametrize("schedule", [NARROW, LOOPED], ids=lambda s: s.tag)
def test_rows_with_infinities_and_nan(schedule: Schedule) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.randn(6, 5)
    x[0], x[1, 2], x[2, 1], x[3, :3], x[4, 4] = -inf, inf, nan, -inf, -inf
    check(lambda x: (x * 1).softmax(-1), x, schedule=schedule)
    check(lambda x: x.amax(-1) + 0, x, schedule=schedule)


AXES = {
    "first axis": (lambda x: x.sum(0), torch.randn(5, 6)),
    "running along the first": (lambda x: x.cumsum(0) + 1, torch.randn(5, 6)),
    "middle axis": (lambda x: x.mean(1), torch.randn(2, 5, 6)),
    "two axes": (lambda x: x.sum((0, 2)), torch.randn(2, 5, 6)),
    "everything": (lambda x: x.sum() * 2, torch.randn(3, 4)),
    "softmax over the middle": (lambda x: x.softmax(1), torch.randn(2, 5, 3)),
    "groups of channels": (lambda x: F.group_norm(x, 2, WEIGHT[:4]), torch.randn(2, 4, 6)),
    "transposed out": (lambda x: x.transpose(0, 1).contiguous() + 1, torch.randn(5, 6)),
    "concatenated": (lambda x: torch.cat([x, x * 2], 1), torch.randn(3, 5)),
    "padded": (lambda x: F.pad(x, (1, 2)) + 1, torch.randn(3, 5)),
    "heads merged": (
        lambda x: x.permute(0, 2, 1, 3).reshape(2, 5, -1) * 2,
        torch.randn(2, 3, 5, 4),
    ),
}


@pytest.mark.parametrize("schedule", [Schedule(1, 16), Schedule(4, 32)], ids=lambda s: s.tag)
@pytest.mark.parametrize("name", AXES)
def test_axes_and_strides(name: str, schedule: Schedule) -> None:
    function, x = AXES[name]
    check(function, x, schedule=schedule)


@pytest.mark.parametrize("name", AXES)
def test_the_chosen_schedule(name: str) -> None:
    function, x = AXES[name]
    if name in ("softmax over the middle", "groups of channels"):
        pytest.skip("a tile of the chosen size takes the interpreter too long")
    check(function, x)


POINTWISE = {
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "expm1": torch.expm1,
    "log1p": lambda x: torch.log1p(x.abs()),
    "power": lambda x: x**2.5,
    "round": torch.round,
    "truncate": torch.trunc,
    "sign": torch.sign,
    "remainder": lambda x: x.remainder(0.7),
    "fmod": lambda x: torch.fmod(x, 0.7),
    "floor_divide": lambda x: torch.floor_divide(x, 0.7),
    "whole floor_divide": lambda x: (x * 9).long() // 4,
    "whole remainder": lambda x: (x * 9).long() % -4,
    "whole power": lambda x: (x * 2).long().clamp(-3, 3) ** 3 + 2 ** (x * 2).long().clamp(0, 5),
    "whole truncate": lambda x: torch.div((x * 9).long(), 4, rounding_mode="trunc"),
    "where": lambda x: torch.where(x > 0, x, 2.0),
    "to bool": lambda x: (x > 0) & ~(x > 1),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "float64 tanh": lambda x: torch.tanh(x.double()),
    "positions": lambda x: x + torch.arange(x.shape[1]),
}


@pytest.mark.parametrize("schedule", [Schedule(1, 8), Schedule(4, 16)], ids=lambda s: s.tag)
def test_a_loop_over_two_parts_stores_each_where_it_belongs(schedule: Schedule) -> None:
    """Rotary embedding of four query heads and the two key heads behind them."""
    inputs = torch.randn(2, 3, 64), torch.randn(3, 8), torch.randn(3, 8)
    check(grouped_rotary, *inputs, schedule=schedule)


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise(name: str) -> None:
    x = torch.tensor([[-3e1, -1.5, -0.5, -1e-6, 0.0, 1e-6], [0.3, 0.5, 1.0, 2.5, 3.5, 30.0]])
    check(POINTWISE[name], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounding_keeps_signs_and_numbers_without_halves(dtype: torch.dtype) -> None:
    """1/x tells zeros apart; halves end at 2^23 in float32, at 2^52 in float64."""
    ends = [2.0**22 - 0.5, 2.0**22 + 0.5, 2.0**23 - 0.5, 2.0**23 + 1, 2.0**24 + 2, 2.0**52 - 0.5,
            2.0**52 + 1, torch.inf, torch.nan, 0.0, 0.3, 0.5, 1.5, 2.5]  # fmt: skip
    x = torch.tensor([ends, [-e for e in ends]], dtype=dtype)
    check(lambda x: (torch.round(x), 1 / torch.round(x)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_device_functions_build_for_both_vendors(dtype: torch.dtype) -> None:
    """The interpreter accepts more than the compilers do."""

    def floats(x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x) + torch.expm1(x) + torch.log1p(x) + torch.round(x) + x.trunc() + x.sign()
        x = x + x.remainder(0.7) + torch.fmod(x, 0.7) + torch.floor_divide(x, 0.7) + x**2.5
        return x.clamp(min=0) + torch.div(x, 3, rounding_mode="trunc") + x.amax(-1, keepdim=True)

    def wholes(x: torch.Tensor) -> torch.Tensor:
        x = x // 3 + x % 5 + torch.fmod(x, 4) + x**x + x.sign()
        return x.clamp(min=0) + torch.div(x, 3, rounding_mode="trunc") + x.amin(-1, keepdim=True)

    function = floats if dtype.is_floating_point else wholes
    made = compile_function(function, torch.ones(3, 12, dtype=dtype))
    build([kernel_job(kernel, target) for kernel in made.kernels for target in ("sm_90", "gfx942")])


@pytest.mark.sweep
@pytest.mark.parametrize("length", [1000, 4097, 70000])
def test_long_rows_build(length: int) -> None:
    """Too long for the interpreter: in registers, in the largest tile, and walked along."""

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        normal, squares = F.layer_norm(x, x.shape[-1:]), F.rms_norm(x, x.shape[-1:])
        return [normal, squares, x.softmax(-1), x.log_softmax(-1), x.cumsum(-1), x.var(-1),
                x.norm(dim=-1), x.logsumexp(-1), x.argmax(-1), (x > 0).any(-1)]  # fmt: skip

    made = compile_function(function, torch.ones(3, 12))
    dims = {"batch": 3, "seq": length}
    build([kernel_job(k, "sm_90", choose_schedule(k, dims)) for k in made.kernels])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_stored_and_float32_computed(dtype: torch.dtype) -> None:
    x = torch.randn(3, 12).to(dtype)
    check(lambda x: F.layer_norm(x + x, (12,)), x, schedule=NARROW)


def test_equal_reductions_share_one_pass() -> None:
    made = compile_function(
        lambda x: x * x.sum(-1, keepdim=True) - x.amax(-1, keepdim=True), torch.ones(3, 12)
    )
    (kernel,) = made.kernels
    source = print_triton(kernel)
    assert source.count("tl.reduce(") + source.count("tl.sum(") == 1
    check(
        lambda x: x * x.sum(-1, keepdim=True) - x.amax(-1, keepdim=True),
        torch.randn(3, 12),
        schedule=SEVERAL,
    )


def test_index_outside_its_table_is_reported_and_not_read() -> None:
    table, ids = torch.randn(10, 12), torch.tensor([3, 9])
    made = compile_function(lambda table, ids: F.embedding(ids, table) * 2, table, ids)
    (got,) = made.run((table, ids), TritonRunner())
    assert torch.equal(got, table[ids] * 2)
    for wrong in (10, -1, 2**40):
        with pytest.raises(CheckFailed):
            made.run((table, torch.tensor([3, wrong])), TritonRunner())


def long_sum() -> ir.Kernel:
    n, rows = dim("n"), dim("rows")
    axes = (ir.Axis("row", rows), ir.Axis("col", n, ir.REDUCTION))
    place = axes[0].symbol * n + axes[1].symbol
    return ir.Kernel(
        "long_sum",
        (
            ir.Param("x", torch.float32, (rows, n), "in"),
            ir.Param("y", torch.float32, (rows,), "out"),
        ),
        axes,
        (
            ir.Load("a", ir.Access("x", place), torch.float32),
            ir.Reduce(("total",), "sum", ("a",), torch.float32),
            ir.Store(ir.Access("y", axes[0].symbol), "total"),
        ),
    )


@pytest.mark.parametrize("length", [1, 1000, 4097, 70000])
def test_rows_of_any_length_at_the_chosen_schedule(length: int) -> None:
    x = torch.randn(2, length)
    got = TritonRunner()(long_sum(), {"x": x}, {"n": length, "rows": 2})["y"]
    exact = interpret(long_sum(), {"x": x}, {"n": length, "rows": 2})["y"]
    assert (got - exact).abs().max() <= 1e-6 * length**0.5


def test_wide_offsets_are_computed_in_64_bits() -> None:
    source = print_triton(long_sum(), Schedule(1, 1024, wide=True))
    assert "tl.program_id(0).to(tl.int64)" in source
    x = torch.randn(2, 5)
    wide = TritonRunner(Schedule(2, 8, wide=True))(long_sum(), {"x": x}, {"n": 5, "rows": 2})
    assert torch.allclose(wide["y"], x.sum(1))


def test_lines_fit_and_names_are_python() -> None:
    scores, bias = torch.ones(2, 4, 7, 7), torch.ones(2, 1, 1, 7)
    made = compile_function(lambda s, b: (s * 0.125 + b).tril().softmax(-1), scores, bias)
    (kernel,) = made.kernels
    for schedule in SCHEDULES:
        source = print_triton(kernel, schedule)
        compile(source, "printed", "exec")
        assert max(map(len, source.splitlines())) <= 100


def test_a_broken_line_keeps_its_value() -> None:
    long = " + ".join(f"value_{k} * {k}" for k in range(12))
    for text in (f"x = 3 * ({long})", f"x = sum([{long}]) + ({long}) * 2", f"x = max({long}, 2)"):
        values = {f"value_{k}": k for k in range(12)}
        broken, whole = dict(values), dict(values)
        exec("\n".join(wrap(text)), broken)
        exec(text, whole)
        assert broken["x"] == whole["x"]


def halves(x: torch.Tensor, y: torch.Tensor) -> Any:
    v = x * 1.1 + y
    return v == v.float(), (v * 1.1).float(), (y.float() / 3).to(x.dtype).float(), v.amax(-1) * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_rounded_where_they_are_compared_or_converted(dtype: torch.dtype) -> None:
    x, y = (torch.randn(3, 12, dtype=dtype) for _ in range(2))
    if dtype is torch.float16:  # Triton's interpreter cuts bfloat16 off, which devices round
        for schedule in (NARROW, LOOPED):
            check(halves, x, y, schedule=schedule)
    kernels = compiled(halves, (x, y)).kernels
    for built in build([kernel_job(k, "sm_90") for k in kernels], measure=False):
        text = built.files["ptx"].read_text()
        assert "fma.rn.f32" not in text  # a product and a sum stay two operations
        assert text.count("cvt.rn.bf16" if dtype is torch.bfloat16 else "cvt.rn.f16") >= 2
