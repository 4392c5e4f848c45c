"""Triton GEMMs of int8 and fp8 in the interpreter, against the same numbers in float64; compiled.

In: small quantised rows with their scales. Out: differences from the exact product of the numbers,
bounded by what PyTorch's ops give; how sums in parts repeat; spills of what is compiled.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.kernels.triton.gemm_jobs import job_of
from tests.kernels.triton.test_gemm import ACTIVATIONS, check_built, run
from turbotx.ir.quantized_ops import LEVELS, quantize_rows, quantized_linear, row_scale
from turbotx.kernels.device_classes import DEVICES
from turbotx.kernels.gemm_heuristics import BUCKETS, choose_tiles
from turbotx.kernels.schedule_selector import Tiles, structure_of
from turbotx.kernels.triton.gemm_template import GemmSchedule, GemmTemplate
from turbotx.passes.quantize import has_fp8

SMALL = GemmSchedule(16, 16, 32)
FP8 = torch.float8_e4m3fn


def operands(template: GemmTemplate, tokens: int) -> dict[str, torch.Tensor]:
    width = template.n * (1 + template.gated)
    rows, weight = torch.randn(tokens, template.k), torch.randn(width, template.k)
    rows[1:2] *= 1e4  # a row of its own size
    given = {}
    for name, scale, x in (("x", "x_scale", rows), ("w", "scales", weight)):
        given[scale] = row_scale(x, template.narrow)
        given[name] = quantize_rows(x, given[scale], template.narrow)
    if template.bias:
        given["bias"] = torch.randn(width).to(template.dtype)
    if template.residual:
        given["residual"] = torch.randn(tokens, template.n).to(template.dtype)
    return given


def meaning(
    template: GemmTemplate, given: dict[str, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    float64 = dtype is torch.float64
    floats = {
        k: t.double() if float64 and t.is_floating_point() and t.dtype not in LEVELS else t
        for k, t in given.items()
    }
    sums = quantized_linear(
        given["x"], given["w"], floats.get("bias"), floats["scales"][:, 0], floats["x_scale"], dtype
    )
    sums, gate = sums.chunk(2, 1) if template.gated else (sums, None)
    out = ACTIVATIONS[template.activation](sums)
    out = out if gate is None else out * gate
    return out + floats["residual"] if template.residual else out


def check(template: GemmTemplate, tokens: int, schedule: GemmSchedule = SMALL) -> torch.Tensor:
    given = operands(template, tokens)
    exact, own = (meaning(template, given, d).double() for d in (torch.float64, template.dtype))
    made: torch.Tensor = run(template, schedule, **given)["out"]
    for ours, mine, true in zip(made.double(), own, exact, strict=True):  # each row by itself
        unit = torch.finfo(template.dtype).eps * true.abs().max()
        assert (ours - true).abs().max() <= 1.5 * (mine - true).abs().max() + 2 * unit
    return made


@pytest.mark.parametrize("narrow", LEVELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "n", "k"), [(1, 16, 32), (5, 40, 33), (33, 16, 96)], ids=lambda v: str(v)
)
def test_sums_of_any_size(
    narrow: torch.dtype, dtype: torch.dtype, tokens: int, n: int, k: int
) -> None:
    check(GemmTemplate(dtype, n, k, bias=True, narrow=narrow), tokens)


@pytest.mark.parametrize("narrow", LEVELS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("gated", "late"), [(False, 1), (True, 0)])
def test_epilogue(narrow: torch.dtype, activation: str, gated: bool, late: int) -> None:
    more = {"activation": activation, "gated": gated, "residual": True}
    template = GemmTemplate(torch.float32, 24, 40, bias=True, narrow=narrow, **more)
    check(template, 3, replace(SMALL, late=late))


def test_sums_of_fp8_in_parts() -> None:
    template = GemmTemplate(torch.float16, 24, 300, gated=True, residual=True, narrow=FP8)
    for splits, late in ((2, 1), (3, 0)):
        check(template, 18, replace(SMALL, splits=splits, late=late))


@pytest.mark.parametrize("gated", [False, True])
def test_sums_in_parts_are_the_same_integers(gated: bool) -> None:
    template = GemmTemplate(torch.float16, 24, 300, gated=gated, residual=True, narrow=torch.int8)
    made = []
    for splits, late in ((1, 1), (2, 1), (3, 0), (8, 1)):
        torch.manual_seed(3)
        made.append(check(template, 18, replace(SMALL, splits=splits, late=late)))
    assert all(torch.equal(made[0], other) for other in made[1:])


def test_the_largest_sums_are_exact() -> None:
    template = GemmTemplate(torch.float32, 16, 2048, narrow=torch.int8)
    full = {"x": torch.full((2, 2048), -127).to(torch.int8), "x_scale": torch.ones(2, 1)}
    w = {"w": torch.full((16, 2048), 127).to(torch.int8), "scales": torch.ones(16, 1)}
    assert (run(template, SMALL, **full, **w)["out"] == -(127**2) * 2048).all()


@pytest.mark.parametrize("narrow", LEVELS, ids=str)
def test_a_row_without_a_scale_is_nan_and_a_row_of_zeros_the_bias(narrow: torch.dtype) -> None:
    template = GemmTemplate(torch.float16, 16, 32, bias=True, narrow=narrow)
    x = torch.randn(4, 32)
    x[1, 3], x[2] = torch.inf, 0.0
    given = operands(template, 4)
    given["x_scale"] = row_scale(x, narrow)
    given["x"] = quantize_rows(x, given["x_scale"], narrow)
    out = run(template, SMALL, **given)["out"]
    assert out[1].isnan().all()
    assert torch.equal(out[2], given["bias"])
    assert out[[0, 3]].isfinite().all()


# --- tiles ---

SHAPES = [(2304, 768), (768, 768), (3072, 768), (768, 3072), (1152, 384), (384, 1536), (30, 768)]


@pytest.mark.parametrize("target", DEVICES)
def test_tiles_fit_the_device(target: str) -> None:
    for (n, k), gated, dtype in itertools.product(
        SHAPES, (False, True), (torch.float16, torch.float32)
    ):
        template = GemmTemplate(dtype, n, k, gated=gated, narrow=torch.int8)
        for tokens in (1, 16, 40, 128, 500, 4096, 100000):
            s = choose_tiles(template, tokens, target)
            assert s.k_tile >= 32
            held = (s.m_tile + s.n_tile * (1 + gated)) * s.k_tile
            assert held * s.num_stages <= DEVICES[target].shared_nbytes


def test_no_library_stands_for_it_and_it_is_tuned_apart() -> None:
    template = GemmTemplate(torch.float16, 768, 768, narrow=torch.int8)
    for tokens in (16, 4096):
        assert Tiles((("gemm_*", "cublas"),), "sm_90", {}).gemm(template, tokens) is not None
    assert structure_of(template) != structure_of(replace(template, narrow=None))
    narrow = Tiles((("gemm_*", "k16"),), "sm_90", {}).gemm(template, 16)
    assert narrow is not None and narrow.k_tile == 32, "a product of int8 takes 32 of k at a time"


# --- compiled ---

TEMPLATES = [
    GemmTemplate(torch.float16, 768, 3072, bias=True, residual=True, narrow=torch.int8),
    GemmTemplate(torch.bfloat16, 3072, 768, bias=True, activation="gelu", narrow=torch.int8),
    GemmTemplate(torch.float16, 11008, 4096, activation="silu", gated=True, narrow=torch.int8),
    GemmTemplate(torch.float32, 768, 768, bias=True, residual=True, narrow=torch.int8),
    GemmTemplate(torch.float32, 1536, 384, bias=True, activation="gelu", narrow=torch.int8),
    GemmTemplate(torch.float16, 2304, 768, bias=True, narrow=torch.int8),
    GemmTemplate(torch.bfloat16, 2816, 1024, activation="gelu_tanh", gated=True, narrow=torch.int8),
    GemmTemplate(torch.float16, 1152, 384, bias=True, narrow=torch.int8),
]


# sm_89 is of the class of sm_80, but multiplies fp8.
TARGETS = {torch.int8: list(DEVICES), FP8: [t for t in ("sm_89", *DEVICES) if has_fp8(t)]}


@pytest.mark.parametrize("narrow", LEVELS, ids=str)
def test_builds_without_spills(narrow: torch.dtype) -> None:
    """Each template once, over the buckets and the targets; the next test has all of them."""
    built = zip(TEMPLATES, BUCKETS, itertools.cycle(TARGETS[narrow]), strict=False)
    check_built(job_of(replace(t, narrow=narrow), bucket, target)
                for t, bucket, target in built)  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize("narrow", LEVELS, ids=str)
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
def test_every_bucket_builds_for_every_target(template: GemmTemplate, narrow: torch.dtype) -> None:
    every = itertools.product(BUCKETS, TARGETS[narrow])
    check_built(job_of(replace(template, narrow=narrow), *where) for where in every)


def test_which_targets_have_fp8() -> None:
    assert TARGETS[FP8] == ["sm_89", "sm_90", "sm_100"]
    assert not has_fp8("cpu") and has_fp8("sm_120") and has_fp8("sm_90a")
