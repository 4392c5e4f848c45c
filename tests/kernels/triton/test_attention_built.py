"""Triton attention compiled: what it uses, on every target, with every operand.

In: kernels of attention and of its two products. Out: no spills, accesses of 128 bits, and which
tiles a number of queries and keys gets.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from turbotx.ir.matmul_kernels import AttentionKernel, ProductKernel
from turbotx.kernels.attention_jobs import attention_job, product_job
from turbotx.kernels.triton.attention import choose_attention_schedule, with_keys
from turbotx.kernels.triton.compiler import TARGETS, build
from turbotx.kernels.triton.products import PRODUCT_STRIDES, choose_product_schedule


def kernel(width, dtype=torch.float32, causal=False, bias="none", **rest):
    return AttentionKernel(dtype, width, 1 / math.sqrt(width), causal, bias, **rest)


def test_one_tile_of_keys_takes_no_loop() -> None:
    case = kernel(64, torch.float16, keys="mask")
    tiles = choose_attention_schedule(case, 40)
    assert tiles.once and with_keys(tiles, 64) == tiles
    assert with_keys(tiles, 65) == replace(tiles, once=0)
    assert not choose_attention_schedule(case, 65).once
    assert "for start" not in attention_job(case, "sm_90", tiles).source


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [16, 64, 80, 128, 256])
def test_builds_for_every_target_without_spills(dtype: torch.dtype, width: int) -> None:
    case = kernel(width, dtype, keys="mask")
    others = [
        kernel(width, dtype, causal=True, window=(127, -1), keys="lengths", bias="storage"),
        kernel(width, dtype, bias="boolean", blind_nan=True),
    ]
    products = [ProductKernel(which, dtype, width) for which in ("scores", "values")]
    cases = (case, *others)
    queries = (None, 16, 64)
    jobs = [
        attention_job(c, target, choose_attention_schedule(c, q))
        for target in TARGETS
        for c in cases
        for q in queries
    ]
    jobs += [product_job(p, target) for target in TARGETS for p in products]
    for b in build(jobs):
        assert b.resources.spills == 0, (b.job.name, b.job.target, b.resources)
        assert b.resources.load_bits >= 128, (b.job.name, b.job.target, b.resources)


@pytest.mark.parametrize("q_len", [1, 128])
def test_builds_with_every_operand(q_len: int) -> None:
    case = kernel(64, torch.float16, causal=True, bias="storage", keys="mask")
    jobs = [attention_job(case, "sm_90", choose_attention_schedule(case, q_len))]
    sunk = kernel(64, torch.bfloat16, True, keys="mask", blind_mean=True, sinks=True)
    jobs.append(attention_job(sunk, "sm_90", choose_attention_schedule(sunk, q_len)))
    for which in ("scores", "values"):
        product = ProductKernel(which, torch.float16, 64)
        tiles = choose_product_schedule(product, q_len)
        jobs.append(product_job(product, "sm_90", tiles, PRODUCT_STRIDES))
    for built in build(jobs):
        assert built.resources.spills == 0, (built.job.name, built.resources)
        assert built.resources.load_bits == 128, (built.job.name, built.resources)
        assert built.resources.store_bits == 128, (built.job.name, built.resources)


@pytest.mark.parametrize(
    ("case", "target"),
    [
        (kernel(64, causal=True, keys="mask"), "sm_80"),
        (kernel(64, causal=True, bias="storage"), "sm_90"),
        (kernel(64, causal=True, window=(3, -1), keys="mask"), "sm_90"),
        (kernel(64, torch.float16, window=(2, 2), keys="mask"), "sm_80"),
        (kernel(80, bias="boolean", blind_nan=True), "sm_80"),
        (kernel(80, causal=True, bias="boolean"), "sm_90"),
        (kernel(256, bias="boolean", blind_nan=True), "sm_80"),
        (kernel(256, causal=True, keys="mask", bias="boolean"), "sm_80"),
        (kernel(256, causal=True, window=(127, -1), keys="lengths", bias="storage"), "sm_80"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_products_beside_masks_do_not_spill(case: AttentionKernel, target: str) -> None:
    (built,) = build([attention_job(case, target)])
    assert built.resources.spills == 0, built.resources
    assert built.resources.load_bits == 128, built.resources


def test_a_bias_beside_wide_heads_does_not_spill() -> None:
    case = kernel(128, torch.float16, bias="boolean", blind_nan=True)
    (built,) = build([attention_job(case, "sm_100")])
    assert built.resources.spills == 0, built.resources
