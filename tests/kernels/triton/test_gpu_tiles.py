"""The tiles that the sweep on a device times: what a device can run, the likely ones first.

In: the list for BERT-base. Out: each fits the device and a program's scratch, and none spills.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is for Linux only")

from benchmarks.gpu_tiles import PRODUCTS, SWEPT, candidates, template_of
from turbotx.kernels.device_classes import device_class
from turbotx.kernels.gemm_heuristics import (
    choose_by_rule,
    choose_gemm,
    choose_tiles,
    fits_scratch,
    shared_nbytes,
)
from turbotx.kernels.triton.compiler import build
from turbotx.kernels.triton.gemm_template import GemmSchedule
from turbotx.kernels.triton.tags import with_tag


def schedules(bucket: int, n: int, k: int) -> list[GemmSchedule]:
    own = choose_tiles(template_of(bucket, n, k), bucket, "sm_90")
    return [with_tag(own, tag) for tag in candidates(bucket, n, k)]


@pytest.mark.parametrize("bucket", SWEPT)
def test_candidates_fit_and_hold_the_rules_own(bucket: int) -> None:
    for n, k in PRODUCTS.values():
        template, found = template_of(bucket, n, k), schedules(bucket, n, k)
        assert choose_by_rule(template, bucket, "sm_90") in found
        assert len(set(found)) == len(found) >= (10 if bucket <= 128 else 6)
        for s in found:
            assert s.m_tile <= bucket
            assert shared_nbytes(template, s) <= device_class("sm_90").shared_nbytes
            assert fits_scratch(template, s, bucket), (bucket, n, k, s)


@pytest.mark.sweep
@pytest.mark.parametrize("bucket", SWEPT)
def test_no_candidate_spills(bucket: int) -> None:
    jobs = []
    for n, k in PRODUCTS.values():
        template = template_of(bucket, n, k)
        jobs += [
            choose_gemm(template, bucket, "sm_90", s, stat_tile=width).job
            for s in schedules(bucket, n, k)
            for width in (16, 32)
        ]
    for b in build(jobs):
        assert b.resources.spills == 0, (b.job.name, b.job.constexprs, b.resources)
