"""Triton GEMMs in the interpreter against float64, and compiled; tiles chosen, overridden, kept.

In: small operands on the CPU. Out: differences from the formula in float64, bounded by what
PyTorch's own ops in the same dtype give; spills and access widths of what is compiled.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.kernels.triton.gemm_jobs import job_of
from tests.kernels.triton.triton_runner import interpreting, load_function
from turbotx.kernels.device_classes import DEVICES, device_class
from turbotx.kernels.gemm_heuristics import (
    BUCKETS,
    MOST_TURNS,
    SPLIT_SUMS_NBYTES,
    bucket_of,
    choose_tiles,
    gemm_job,
    prefers_template,
)
from turbotx.kernels.job import Job
from turbotx.kernels.triton.compiler import build
from turbotx.kernels.triton.gemm import print_triton_gemm
from turbotx.kernels.triton.gemm_template import (
    GemmSchedule,
    GemmTemplate,
    gemm_arguments,
    gemm_grid,
    gemm_scratch,
)
from turbotx.program.folded_weights import (
    fold_scales,
    fold_shift,
    fold_sums,
    fold_weight,
    join_affine,
)

SMALL = GemmSchedule(16, 16, 16)
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}


def run(template: GemmTemplate, schedule: GemmSchedule, **given: torch.Tensor) -> dict[str, Any]:
    """Run a GEMM over named tensors; return "out" and, where they are left, "stats"."""
    x, w = given["x"], given["w"]
    tokens, tiles = len(x), -(-template.n // schedule.n_tile)
    partial, turns = (nbytes // 4 for nbytes in gemm_scratch(template, schedule, tokens))
    made = {
        "out": torch.full((tokens, template.n), float("nan"), dtype=template.dtype),
        "stats": torch.full((tokens, tiles), -1, dtype=torch.int32)
        if template.peaks
        else torch.full((2, tokens, tiles), float("nan")),
        "partial": torch.full(
            (partial,), -1, dtype=torch.int32 if template.kind == "int8" else torch.float32
        ),
        "turns": torch.zeros(turns, dtype=torch.int32),
    }
    sizes = {"tokens": tokens, "x_row": x.stride(0), "out_row": template.n}
    sizes["w_row"] = w.stride(1) if template.flipped else w.stride(0)
    if template.residual:
        sizes["residual_row"] = given["residual"].stride(0)
    named = {f"{k}_ptr": t for k, t in (given | made).items()} | sizes
    args = [named[name] for name, _ in gemm_arguments(template, schedule)]
    grid = gemm_grid(template, schedule, tokens)
    consts = {"M_TILE": schedule.m_tile, "N_TILE": schedule.n_tile, "K_TILE": schedule.k_tile}
    if tokens:
        with interpreting():
            load_function(print_triton_gemm(template, schedule), template.name)[grid](
                *args, **consts
            )
    assert (made["turns"] == 0).all()
    return made


def operands(template: GemmTemplate, tokens: int) -> dict[str, torch.Tensor]:
    rows = template.n * (1 + template.gated)
    wide = torch.randn(tokens, template.k + 16)  # x is a window on wider rows
    given = {"x": wide[:, : template.k], "w": torch.randn(rows, template.k) / template.k**0.5}
    if template.flipped:
        given["w"] = given["w"].t().contiguous().t()
    if template.bias:
        given["bias"] = torch.randn(rows)
    if template.residual:
        given["residual"] = torch.randn(tokens, template.n)
    return {name: t.to(template.dtype) for name, t in given.items()}


def meaning(template: GemmTemplate, given: dict[str, torch.Tensor]) -> torch.Tensor:
    sums = F.linear(given["x"], given["w"], given.get("bias"))
    sums, gate = sums.chunk(2, 1) if template.gated else (sums, None)
    out = ACTIVATIONS[template.activation](sums)
    out = out if gate is None else out * gate
    return out + given["residual"] if template.residual else out


def check(template: GemmTemplate, tokens: int, schedule: GemmSchedule = SMALL) -> None:
    given = operands(template, tokens)
    exact = meaning(template, {name: t.double() for name, t in given.items()})
    own, ours = meaning(template, given).double(), run(template, schedule, **given)["out"].double()
    unit = torch.finfo(template.dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 1.5 * (own - exact).abs().max() + 2 * unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "n", "k"), [(1, 16, 16), (5, 40, 33), (33, 16, 64)], ids=lambda v: str(v)
)
def test_sums_of_any_size(dtype: torch.dtype, tokens: int, n: int, k: int) -> None:
    check(GemmTemplate(dtype, n, k, bias=True), tokens)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("gated", "late"), [(False, 1), (True, 1), (True, 0)])
def test_epilogue(activation: str, gated: bool, late: int) -> None:
    template = GemmTemplate(
        torch.float32, 24, 16, bias=True, activation=activation, gated=gated, residual=True
    )
    check(template, 3, replace(SMALL, late=late))


@pytest.mark.parametrize(("splits", "late"), [(2, 1), (3, 0), (3, 1), (8, 1)])
@pytest.mark.parametrize("gated", [False, True])
def test_sums_in_parts(splits: int, gated: bool, late: int) -> None:
    template = GemmTemplate(torch.float32, 24, 100, bias=True, gated=gated, residual=True)
    check(template, 18, replace(SMALL, splits=splits, late=late))


def test_weights_stored_the_other_way() -> None:
    check(GemmTemplate(torch.float32, 24, 40, bias=True, gated=True, flipped=True), 5)


def test_no_tokens_and_many_groups_of_tiles() -> None:
    check(GemmTemplate(torch.float32, 16, 16), 16 * 17 + 1)
    check(GemmTemplate(torch.float32, 56, 16), 16 * 11)  # 8 and 3 tiles of tokens, 4 of outputs
    assert gemm_grid(GemmTemplate(torch.float32, 16, 16), SMALL, 0) == (0, 1, 1)


@pytest.mark.parametrize(("n", "tile"), [(32, 16), (40, 16), (16, 32)])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_statistics_are_those_of_what_is_stored(n: int, tile: int, mean: float) -> None:
    template = GemmTemplate(torch.float32, n, 16, residual=True, stats=True)
    given = operands(template, 5)
    given["residual"] += mean
    made = run(template, replace(SMALL, n_tile=tile), **given)
    out = made["out"].double()
    for k, piece in enumerate(out.split(tile, 1)):
        means, m2 = made["stats"][:, :, k].double()
        torch.testing.assert_close(means, piece.mean(1), rtol=1e-6, atol=1e-6)
        exact = (piece - piece.mean(1, keepdim=True)).square().sum(1)
        torch.testing.assert_close(m2, exact, rtol=1e-4 if mean else 1e-5, atol=1e-6)


MEANS = [(torch.float32, 0.0), (torch.float32, 1e4), (torch.float16, 1.0), (torch.float16, 100.0),
         (torch.bfloat16, 0.0), (torch.bfloat16, 30.0)]  # fmt: skip


def normalise(x: torch.Tensor, norm: str, gamma: Any, beta: Any) -> torch.Tensor:
    shape = x.shape[-1:]
    return F.layer_norm(x, shape, gamma, beta) if norm == "layer" else F.rms_norm(x, shape, gamma,
                                                                                  1e-5)  # fmt: skip


def rows_with_statistics(dtype: torch.dtype, mean: float, width: int) -> dict[str, Any]:
    """What a GEMM leaves: rows of `width`, 5 of them, and statistics of every 16 columns."""
    first = GemmTemplate(dtype, width, 32, residual=True, stats=True)
    given = operands(first, 5)
    given["residual"] = (given["residual"].float() + mean).to(dtype)
    return run(first, SMALL, **given)


def assert_close(ours: torch.Tensor, own: torch.Tensor, exact: torch.Tensor) -> None:
    unit = torch.finfo(own.dtype).eps * exact.abs().max()
    error, allowed = (ours.double() - exact).abs().max(), (own.double() - exact).abs().max()
    assert error <= 1.5 * allowed + 2 * unit


@pytest.mark.parametrize(("dtype", "mean"), MEANS, ids=str)
@pytest.mark.parametrize(
    ("norm", "late", "splits"), [("layer", 1, 1), ("layer", 0, 1), ("layer", 1, 3), ("rms", 1, 1)]
)
def test_a_norm_between_two_gemms(
    dtype: torch.dtype, mean: float, norm: str, late: int, splits: int
) -> None:
    made = rows_with_statistics(dtype, mean, 40)
    weight, bias = (torch.randn(24, 40) / 6).to(dtype), torch.randn(24).to(dtype)
    gamma, beta = torch.randn(40).to(dtype), torch.randn(40).to(dtype) if norm == "layer" else None
    scales = fold_scales(weight, gamma) if dtype is torch.float16 else None
    folded = fold_weight(weight, gamma, scales)
    template = GemmTemplate(dtype, 24, 40, bias=True, norm=norm, scaled=scales is not None)
    ours = run(
        template, replace(SMALL, stat_tile=16, late=late, splits=splits),
        x=made["out"], w=folded, scales=scales,
        bias=fold_shift(weight, beta, bias), sums=fold_sums(folded, scales), x_stats=made["stats"],
    )["out"]  # fmt: skip
    given = [made["out"], gamma, beta, weight, bias]
    exact, own = (
        F.linear(normalise(x, norm, g, s), w, b)
        for x, g, s, w, b in ([t if t is None else t.double() for t in given], given)
    )
    assert_close(ours, own, exact)


@pytest.mark.parametrize(("dtype", "mean"), MEANS, ids=str)
@pytest.mark.parametrize(
    ("norm", "late", "splits"), [("layer", 1, 1), ("layer", 0, 2), ("layer", 1, 2), ("rms", 1, 1)]
)
def test_a_residual_is_normalised_as_it_is_read(
    dtype: torch.dtype, mean: float, norm: str, late: int, splits: int
) -> None:
    made = rows_with_statistics(dtype, mean, 24)
    template = GemmTemplate(dtype, 24, 40, bias=True, residual=True, residual_norm=norm, stats=True)
    gamma, beta = torch.randn(24).to(dtype), torch.randn(24).to(dtype) if norm == "layer" else None
    given = operands(template, 5) | {"residual": made["out"]}
    ours = run(
        template, replace(SMALL, residual_tile=16, late=late, splits=splits), **given,
        residual_norm=join_affine(given["w"], gamma, beta), residual_stats=made["stats"],
    )["out"]  # fmt: skip
    own = meaning(template, given | {"residual": normalise(made["out"], norm, gamma, beta)})
    wide = {name: t.double() for name, t in given.items()}
    affine = [t if t is None else t.double() for t in (gamma, beta)]
    wide["residual"] = normalise(wide["residual"], norm, *affine)
    assert_close(ours, own, meaning(template, wide))


def test_many_statistics_are_merged_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbotx.kernels.triton.statistics.MERGED", 0)  # 16 of them
    made = rows_with_statistics(torch.float32, 3.0, 300)
    weight = torch.randn(16, 300) / 17
    template = GemmTemplate(torch.float32, 16, 300, norm="layer")
    ours = run(template, replace(SMALL, stat_tile=16), x=made["out"], w=weight,
               x_stats=made["stats"])["out"]  # fmt: skip
    exact = F.linear(normalise(made["out"].double(), "layer", None, None), weight.double())
    assert_close(ours, F.linear(normalise(made["out"], "layer", None, None), weight), exact)


def test_sums_are_those_of_the_rounded_weight() -> None:
    weight = torch.randn(8, 64, dtype=torch.float64).to(torch.bfloat16)
    folded = fold_weight(weight, torch.rand(64).to(torch.bfloat16), None)
    assert folded.dtype is torch.bfloat16
    assert torch.equal(fold_sums(folded, None), folded.double().sum(1).float())
    assert (fold_shift(weight, None, None) == 0).all()


@pytest.mark.parametrize("size", [1e-5, 1.0, 6e4])
def test_scales_keep_a_small_or_large_gamma_in_range(size: float) -> None:
    weight, gamma = torch.randn(8, 64).half(), (torch.rand(64) * size).half()
    scales = fold_scales(weight, gamma)
    back = fold_weight(weight, gamma, scales).double() * scales.double()[:, None]
    exact = weight.double() * gamma.double()
    largest = exact.abs().amax(1, keepdim=True)
    assert ((back - exact).abs() <= 2**-11 * exact.abs() + 2**-24 * largest).all()
    assert torch.equal(fold_scales(torch.zeros(2, 64).half(), gamma), torch.ones(2))


# --- choosing tiles ---

SHAPES = [(2304, 768), (768, 768), (3072, 768), (768, 3072), (1152, 384), (30, 768)]


@pytest.mark.parametrize("target", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_tiles_fit_the_device(target: str, dtype: torch.dtype) -> None:
    device = DEVICES[target]
    for n, k in SHAPES:
        for gated in (False, True):
            template = GemmTemplate(dtype, n, k, gated=gated)
            for tokens in (1, 16, 40, 128, 500, 4096, 100000):
                s = choose_tiles(template, tokens, target)
                assert s.m_tile <= max(16, bucket_of(tokens))
                held = (s.m_tile + s.n_tile * (1 + gated)) * s.k_tile * dtype.itemsize
                assert held * s.num_stages <= device.shared_nbytes
                assert s.splits == 1 or s.splits * s.k_tile <= k


def test_any_stream_of_lengths_needs_a_handful_of_builds() -> None:
    template = GemmTemplate(torch.float16, 768, 768)
    chosen = {choose_tiles(template, tokens, "sm_90") for tokens in range(1, 5000, 7)}
    assert len(chosen) <= len(BUCKETS)
    small = replace(template, n=1024, k=1024)
    busy = gemm_grid(small, choose_tiles(small, 16, "sm_90"), 16)
    assert busy[0] * busy[1] >= 64  # few tokens: narrow tiles, and sums in parts


def test_scratch_holds_the_parts_of_every_choice() -> None:
    for dtype in (torch.float16, torch.float32):
        for n, k in SHAPES:
            for gated in (False, True):
                template = GemmTemplate(dtype, n, k, gated=gated)
                for target, tokens in itertools.product(DEVICES, (*BUCKETS, 100000)):
                    tiles = choose_tiles(template, tokens, target)
                    partial_nbytes, turns_nbytes = gemm_scratch(template, tiles, tokens)
                    assert partial_nbytes <= SPLIT_SUMS_NBYTES
                    assert turns_nbytes <= 4 * MOST_TURNS
    mine = GemmSchedule(32, 64, 64, 8, 2, 4)
    normed = GemmTemplate(torch.float16, 768, 768, norm="layer")
    assert gemm_grid(normed, mine, 40) == (2 * 12, 4, 1)
    assert gemm_scratch(normed, mine, 40) == (24 * 4 * 32 * 64 * 4, 24 * 4)


def test_few_tokens_take_a_template_and_many_the_library_where_it_is_faster() -> None:
    plain, joined = GemmTemplate(torch.float16, 768, 768), GemmTemplate(
        torch.float16, 3072, 768, bias=True, activation="gelu"
    )  # fmt: skip
    for target in DEVICES:
        for template in (plain, joined):
            assert all(prefers_template(template, t, target) for t in (1, 16, 40, 64))
        few = device_class(target).few_tokens
        assert prefers_template(plain, few, target)
        many = (few + 1, 512, 4096, 100000)
        assert not any(prefers_template(plain, t, target) for t in many)
        exact = replace(plain, dtype=torch.float32)
        assert not prefers_template(exact, 512, target)
    assert prefers_template(joined, 4096, "sm_90")  # the bytes that a second kernel would move
    answers = {t: prefers_template(joined, t, "sm_90") for t in range(513, 1025)}
    assert len(set(answers.values())) == 1  # of one bucket


def test_devices_between_the_classes_count_as_the_older_one() -> None:
    assert device_class("sm_89") is DEVICES["sm_80"]
    assert device_class("sm_120") is DEVICES["sm_100"]


# --- compiled ---

FULL = {"bias": True, "residual": True, "residual_norm": "layer", "stats": True}
TEMPLATES = [
    GemmTemplate(torch.float16, 768, 3072, **FULL),
    GemmTemplate(torch.bfloat16, 3072, 768, bias=True, activation="gelu", norm="layer"),
    GemmTemplate(
        torch.float16, 11008, 4096, activation="silu", gated=True, norm="rms", scaled=True
    ),
    GemmTemplate(torch.float32, 768, 768, activation="gelu_tanh", norm="layer", **FULL),
    GemmTemplate(torch.float16, 2304, 768, bias=True, flipped=True),
    GemmTemplate(torch.bfloat16, 2816, 1024, activation="silu", gated=True),
    GemmTemplate(torch.float32, 1536, 384, bias=True, activation="gelu"),
    GemmTemplate(torch.float32, 768, 768, bias=True, residual=True, tf32=True),
    GemmTemplate(torch.float16, 2304, 768, bias=True, norm="layer", scaled=True),
    GemmTemplate(torch.bfloat16, 4096, 4096, residual=True, stats=True),
]
# The narrowest that the heuristics choose: the most statistics a row.
NARROW = 32


def check_built(jobs: Iterable[Job]) -> None:
    for b in build(list(jobs)):
        assert b.resources.spills == 0, (b.job.name, b.job.target, b.job.constexprs, b.resources)
        assert b.resources.load_bits >= 128, (b.job.name, b.job.target, b.resources)


def test_builds_without_spills() -> None:
    """Each template once, over the buckets and the targets; the next test has all of them."""
    check_built(
        job_of(template, bucket, target, stat_tile=NARROW)
        for template, bucket, target in zip(
            TEMPLATES, itertools.cycle(BUCKETS), itertools.cycle(DEVICES), strict=False
        )
    )


@pytest.mark.sweep
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
def test_every_bucket_builds_for_every_target(template: GemmTemplate) -> None:
    every = itertools.product(BUCKETS, DEVICES)
    check_built(job_of(template, *where, stat_tile=NARROW) for where in every)


def test_unaligned_rows_are_loaded_narrowly() -> None:
    template = GemmTemplate(torch.float16, 64, 64)
    job = gemm_job(template, "sm_90", choose_tiles(template, 16, "sm_90"), divisible=())
    (built,) = build([job])
    assert built.resources.load_bits < 128
