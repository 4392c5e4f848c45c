"""Rows that products quantise as they read, by what those who made them have left: bit for bit.

In: products of int8 and attention in Triton's interpreter. Out: the largest magnitudes that they
leave, beside the rows' own; and the same bits as from rows that were quantised before.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.kernels.triton import attention_runner
from tests.kernels.triton.gemm_jobs import job_of
from tests.kernels.triton.test_gemm import check_built, run
from tests.kernels.triton.test_quantized_gemm import SHAPES, TARGETS, operands
from turbotx.ir.matmul_kernels import AttentionKernel
from turbotx.ir.quantized_ops import LEVELS, quantize_rows, row_scale
from turbotx.kernels.attention_jobs import attention_job
from turbotx.kernels.device_classes import DEVICES
from turbotx.kernels.gemm_heuristics import (
    BUCKETS,
    choose_tiles,
    prefers_quantizing,
)
from turbotx.kernels.triton.gemm_template import GemmSchedule, GemmTemplate

SMALL = GemmSchedule(16, 16, 32)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def peaks_of(rows: torch.Tensor, part: int) -> torch.Tensor:
    """The bits of the largest magnitudes of each `part` columns."""
    bits = rows.float().view(torch.int32) & 0x7FFFFFFF
    return torch.stack([piece.amax(1) for piece in bits.split(part, 1)], 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "gated"), [(40, False), (32, True)])
def test_a_product_leaves_the_largest_magnitudes_of_what_it_stores(
    dtype: torch.dtype, n: int, gated: bool
) -> None:
    template = GemmTemplate(dtype, n, 33, True, "gelu", gated, narrow=torch.int8, peaks=True)
    for splits in (1, 2):
        given = operands(template, 19)
        given["x_scale"][4] = torch.nan  # a row that held an infinity
        made = run(template, replace(SMALL, splits=splits), **given)
        assert torch.equal(made["stats"], peaks_of(made["out"], 16))
        assert (made["stats"][4] > 0x7F800000).all()


def rows_of(dtype: torch.dtype, k: int) -> torch.Tensor:
    x = torch.randn(21, k) * torch.logspace(-20, 4, 21)[:, None]
    x[1], x[2], x[3, 5], x[4, 7] = 0.0, 1e-38, torch.nan, torch.inf
    x[5] = torch.linspace(-127, 127, k)  # halves among them
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("narrow", LEVELS, ids=str)
@pytest.mark.parametrize(("splits", "late", "gated"), [(1, 1, False), (1, 0, True), (3, 1, False)])
def test_rows_quantised_as_they_are_read_give_the_same_bits(
    dtype: torch.dtype, narrow: torch.dtype, splits: int, late: int, gated: bool
) -> None:
    template = GemmTemplate(dtype, 24, 100, True, gated=gated, residual=True, narrow=narrow)
    schedule, x = replace(SMALL, splits=splits, late=late), rows_of(dtype, 100)
    given = operands(template, 21)
    scale = row_scale(x, narrow)
    rows = quantize_rows(x, scale, narrow)
    before = run(template, schedule, **given | {"x": rows, "x_scale": scale})
    for part in (16, 100):
        reading = replace(template, quantizes=True)
        own = {"x": x, "x_scale": peaks_of(x, part)}
        made = run(reading, replace(schedule, stat_tile=part), **given | own)
        torch.testing.assert_close(made["out"], before["out"], rtol=0, atol=0, equal_nan=True)
    assert made["out"][[3, 4]].isnan().all() and not made["out"][[0, 1, 2]].isnan().any()


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("width", [16, 20])
def test_attention_leaves_them_by_head(
    width: int, once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_runner, "ONCE", once)
    q, k, v = attention_runner.operands(2, 3, 1, 21, 21, width, torch.float16)
    v[1, :, 4] = torch.nan
    kernel = AttentionKernel(torch.float16, width, 0.3, False, peaks=True)
    peaks = torch.full((2 * 21, 3), -1, dtype=torch.int32)
    out = attention_runner.run(kernel, q, k, v, peaks=peaks)
    plain = attention_runner.run(replace(kernel, peaks=False), q, k, v)
    assert torch.equal(out.nan_to_num(), plain.nan_to_num())
    assert torch.equal(peaks, peaks_of(out.flatten(0, 1).flatten(1), width))


# --- where, and what they are compiled to ---


def test_bytes_decide() -> None:
    """Few tokens wait for launches, many for bytes, of wide rows above all."""
    narrow, wide = (
        [GemmTemplate(torch.float16, n, k, narrow=torch.int8, quantizes=True) for n, k in shapes]
        for shapes in ([(768, 768), (768, 3072)], [(4096, 4096), (4096, 11008)])
    )
    for templates, most in ((narrow, 256), (wide, 16)):
        chosen = [tokens for tokens in BUCKETS if prefers_quantizing(templates, tokens, "sm_90")]
        assert chosen == [tokens for tokens in BUCKETS if tokens <= most]


def test_tiles_fit_the_device() -> None:
    for target, (n, k), gated in itertools.product(DEVICES, SHAPES, (False, True)):
        template = GemmTemplate(torch.float32, n, k, gated=gated, narrow=torch.int8, quantizes=True)
        for tokens in (1, 40, 500, 100000):
            s = choose_tiles(template, tokens, target)
            held = 4 * s.m_tile * s.k_tile + s.n_tile * (1 + gated) * s.k_tile
            assert s.k_tile >= 32 and held * s.num_stages <= DEVICES[target].shared_nbytes


TEMPLATES = [
    GemmTemplate(torch.float16, 768, 3072, True, residual=True, narrow=torch.int8, quantizes=True),
    GemmTemplate(torch.bfloat16, 768, 768, True, residual=True, narrow=torch.int8, quantizes=True),
    GemmTemplate(torch.float32, 768, 768, True, residual=True, narrow=torch.int8, quantizes=True),
    GemmTemplate(torch.float16, 3072, 768, True, "gelu", narrow=torch.int8, peaks=True),
    GemmTemplate(torch.float32, 1536, 384, True, "gelu", narrow=torch.int8, peaks=True),
    GemmTemplate(torch.float16, 11008, 4096, False, "silu", True, narrow=torch.int8, peaks=True),
    GemmTemplate(torch.float16, 384, 1536, True, residual=True, narrow=torch.int8, quantizes=True),
    GemmTemplate(torch.float16, 4096, 11008, residual=True, narrow=torch.int8, quantizes=True),
]


def with_peaks(template: GemmTemplate, bucket: int, target: str):
    schedule = replace(choose_tiles(template, bucket, target), stat_tile=64)
    return job_of(template, bucket, target, schedule)


def test_builds_without_spills() -> None:
    """Each template once, over the buckets and the targets; the next test has all of them."""
    for narrow, targets in TARGETS.items():
        built = zip(TEMPLATES, BUCKETS, itertools.cycle(targets), strict=False)
        check_built(with_peaks(replace(t, narrow=narrow), *where) for t, *where in built)
    kernel = AttentionKernel(torch.float16, 64, 0.125, False, keys="mask", peaks=True)
    check_built(attention_job(kernel, target) for target in DEVICES)


@pytest.mark.sweep
@pytest.mark.parametrize("narrow", LEVELS, ids=str)
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
def test_every_bucket_builds_for_every_target(template: GemmTemplate, narrow: torch.dtype) -> None:
    every = itertools.product(BUCKETS, TARGETS[narrow])
    check_built(with_peaks(replace(template, narrow=narrow), *where) for where in every)
