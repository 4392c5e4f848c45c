"""Triton's products of experts and their routes: against their meaning, and built.

In: rows whose experts have many, one or none, weights stored either way, wrong ends. Out: what the
interpreter computes, beside float64; no spills on any target.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.kernels.triton.attention_runner import launch
from turbotx.ir.expert_ops import grouped_linear, route
from turbotx.kernels.gemm_heuristics import BUCKETS, choose_tiles, gemm_job
from turbotx.kernels.triton.compiler import TARGETS, build
from turbotx.kernels.triton.experts import RouteSchedule, print_triton_route, route_job
from turbotx.kernels.triton.gemm import print_triton_gemm
from turbotx.kernels.triton.gemm_template import GemmSchedule, GemmTemplate, gemm_grid

SMALL = GemmSchedule(16, 16, 16, prefetch=0)


def multiply(x, weight, ends, activation="none", gated=False):
    """Run the template over x (rows, k) and weight (experts, n, k); returns out and the status."""
    experts, n, k = weight.shape
    flipped = weight.stride(1) == 1 and k != 1
    width = n // 2 if gated else n
    template = GemmTemplate(
        x.dtype, width, k, activation=activation, gated=gated, flipped=flipped, experts=experts,
        expert_step=weight.stride(0),
    )  # fmt: skip
    out = torch.full((x.shape[0], width), float("nan"), dtype=x.dtype)
    status = torch.zeros(1, dtype=torch.int32)
    sizes = (x.shape[0], x.stride(0), weight.stride(2 if flipped else 1), width)
    launch(
        print_triton_gemm(template, SMALL), template.name, gemm_grid(template, SMALL, x.shape[0]),
        (x, weight, out, ends, status, *sizes), {"M_TILE": 16, "N_TILE": 16, "K_TILE": 16},
    )  # fmt: skip
    return out, int(status)


def ends_of(*counts):
    return torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32)


COUNTS = [(3, 0, 20, 1), (0, 0, 0, 5), (40,), (1, 1, 0), (0, 0)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("stored", ["n k", "k n"])
def test_every_expert_multiplies_its_rows(counts: tuple[int, ...], stored: str) -> None:
    x = torch.randn(sum(counts), 20)
    weight = torch.randn(len(counts), 36, 20)
    if stored == "k n":
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    out, status = multiply(x, weight, ends_of(*counts))
    exact = grouped_linear(x.double(), weight.double(), ends_of(*counts))
    assert status == 0 and torch.allclose(out.double(), exact, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_gate_of_sixteen_bits(dtype: torch.dtype) -> None:
    x, weight = torch.randn(9, 32, dtype=dtype), torch.randn(3, 64, 32, dtype=dtype) / 8
    out, _ = multiply(x, weight, ends_of(5, 0, 4), "silu", gated=True)
    gate, factor = grouped_linear(x.double(), weight.double(), ends_of(5, 0, 4)).chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * factor
    assert (out - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_rows_behind_the_last_expert_are_zero() -> None:
    x, weight = torch.randn(30, 16), torch.randn(2, 16, 16)
    out, status = multiply(x, weight, ends_of(4, 3))
    assert status == 0 and (out[7:] == 0).all()
    assert torch.allclose(out, grouped_linear(x, weight, ends_of(4, 3)), atol=1e-5)


@pytest.mark.parametrize("ends", [[2, 6], [4, 3], [-1, 5]], ids=str)
def test_wrong_ends_are_told(ends: list[int]) -> None:
    x, weight = torch.randn(5, 16), torch.randn(2, 16, 16)
    assert multiply(x, weight, torch.tensor(ends, dtype=torch.int32))[1] == 1


@pytest.mark.parametrize(("rows", "experts", "tile"), [(0, 3, 16), (1, 2, 16), (50, 5, 16)])
def test_route(rows: int, experts: int, tile: int) -> None:
    chosen = torch.randint(experts - 1, (rows,))  # the last expert gets none
    expected = route(chosen, experts=experts)
    found = [torch.full_like(x, -1) for x in expected]
    source = print_triton_route(RouteSchedule(tile))
    launch(source, "route", (experts, 1, 1), (chosen, *found, rows, experts), {"TILE": tile})
    assert all(map(torch.equal, found, expected))


def jobs(dtype, target, buckets):
    said = {"activation": "silu", "gated": True}
    gated = GemmTemplate(dtype, 768, 2048, experts=128, expert_step=1536 * 2048, **said)
    plain = GemmTemplate(dtype, 2880, 2880, flipped=True, experts=32, expert_step=2880 * 2880)
    return [
        gemm_job(t, target, replace(choose_tiles(t, bucket, target), splits=1, prefetch=0))
        for t in (gated, plain)
        for bucket in buckets
    ]


def check_built(made) -> None:
    for b in build(list(made)):
        assert b.resources.spills == 0, (b.job.name, b.job.target, b.job.constexprs, b.resources)


def test_builds_without_spills() -> None:
    check_built([*jobs(torch.bfloat16, "sm_90", (16, 128)), route_job("sm_90")])


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_builds_for_every_target_and_bucket_without_spills(dtype: torch.dtype) -> None:
    check_built(job for t in TARGETS for job in (*jobs(dtype, t, BUCKETS), route_job(t)))
