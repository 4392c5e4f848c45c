"""Tiles of GEMMs and attention: tags, and which of option, tuning and heuristics is asked first.

In: templates and tags. Out: schedules, or the words that refuse what is none.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from turbotx.errors import OptionsError
from turbotx.ir.matmul_kernels import AttentionKernel
from turbotx.kernels.device_classes import device_class
from turbotx.kernels.gemm_heuristics import (
    BUCKETS,
    choose_by_rule,
    choose_tiles,
    fits_scratch,
    shared_nbytes,
)
from turbotx.kernels.schedule_selector import (
    MOST_SUMS,
    Tiles,
    attention_neighbours,
    gemm_neighbours,
    structure_of,
)
from turbotx.kernels.triton.attention import choose_attention_schedule
from turbotx.kernels.triton.gemm_template import GemmSchedule, GemmTemplate
from turbotx.kernels.triton.gemm_tiles import EXPECTED_TILES, MEASURED_TILES
from turbotx.kernels.triton.tags import tag_of, with_tag
from turbotx.options import Options

GEMM = GemmTemplate(torch.float16, 768, 3072, bias=True, residual=True)
ATTENTION = AttentionKernel(torch.float16, 64, 0.125, causal=False)


def test_a_tag_names_all_of_a_schedule_or_a_part() -> None:
    schedule = GemmSchedule(64, 32, 128, 4, 3, 2)
    assert tag_of(schedule) == "m64n32k128w4s3x2l1p1"
    assert with_tag(GemmSchedule(16, 16, 16), tag_of(schedule)) == schedule
    assert with_tag(schedule, "s4x1r2") == replace(schedule, num_stages=4, splits=1)
    assert with_tag(schedule, "l0").late == 0 and with_tag(schedule, "s8").num_stages == 8
    assert tag_of(None) == "cublas"
    tiles = choose_attention_schedule(ATTENTION, 100)
    assert with_tag(tiles, "q32w8") == replace(tiles, q_tile=32, num_warps=8)


@pytest.mark.parametrize("tag", ["", "m", "m48", "k8", "s9", "w3", "l2", "m64-n32", "cublas"])
def test_what_names_no_tiles_is_refused(tag: str) -> None:
    with pytest.raises(OptionsError, match="tiles"):
        with_tag(GemmSchedule(16, 16, 16), tag)


def test_an_option_goes_before_tuning_and_that_before_the_heuristics() -> None:
    own = choose_tiles(GEMM, 40, "sm_90")
    assert Tiles((), "sm_90", {}).gemm(GEMM, 40) == own
    assert Tiles((), "sm_90", {}, "cublas").gemm(GEMM, 40) is None
    plain = GemmTemplate(torch.float16, 768, 768)
    assert Tiles((), "sm_90", {}).gemm(plain, 512) is None
    assert Tiles((), "sm_90", {}, "triton").gemm(plain, 512) == choose_tiles(plain, 512, "sm_90")
    tuned = {structure_of(GEMM): {"64": "cublas", "128": "n64"}}
    assert Tiles((), "sm_90", tuned).gemm(GEMM, 40) is None
    assert Tiles((), "sm_90", tuned, "triton").gemm(GEMM, 40) == own
    but = (("gemm_*_add", "cublas"),)
    assert Tiles(but, "sm_90", {}, "triton").gemm(GEMM, 40) is None
    assert Tiles((), "sm_90", tuned).gemm(GEMM, 100) == replace(
        choose_tiles(GEMM, 128, "sm_90"), n_tile=64
    )
    asked = Tiles((("gemm_float16_768x*", "w8"),), "sm_90", tuned).gemm(GEMM, 40)
    assert asked == replace(own, num_warps=8)


def test_a_table_goes_before_the_rule_and_what_was_measured_before_what_is_expected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rule = choose_by_rule(GEMM, 40, "sm_90")
    measured = choose_tiles(GEMM, 40, "sm_90")
    assert measured == with_tag(rule, MEASURED_TILES["sm_90"][64, 768, 3072]) != rule
    expected = with_tag(choose_by_rule(GEMM, 20, "sm_90"), EXPECTED_TILES["sm_90"][32, 768, 3072])
    assert choose_tiles(GEMM, 20, "sm_90") == expected
    monkeypatch.setitem(MEASURED_TILES["sm_90"], (64, 768, 3072), "n16s3")
    monkeypatch.setitem(MEASURED_TILES["sm_90"], (64, 768, 3072, True), "n32s2")
    assert choose_tiles(GEMM, 40, "sm_90") == replace(rule, n_tile=16, num_stages=3)
    assert choose_tiles(replace(GEMM, gated=True), 40, "sm_90").num_stages == 2
    for other in (replace(GEMM, flipped=True), replace(GEMM, dtype=torch.float32)):
        assert choose_tiles(other, 40, "sm_90") == choose_by_rule(other, 40, "sm_90")
    assert choose_tiles(GEMM, 513, "sm_90") == choose_by_rule(GEMM, 513, "sm_90")
    assert choose_tiles(GEMM, 40, "sm_80") == choose_by_rule(GEMM, 40, "sm_80")


def test_the_tables_hold_what_a_device_can_run() -> None:
    for table in (MEASURED_TILES, EXPECTED_TILES):
        for target, rows in table.items():
            for bucket, n, k, *gated in rows:
                template = GemmTemplate(torch.float16, n, k, gated=bool(gated))
                s = choose_tiles(template, bucket, target)
                assert bucket in BUCKETS and s.m_tile <= max(16, bucket)
                assert shared_nbytes(template, s) <= device_class(target).shared_nbytes
                assert fits_scratch(template, s, bucket)


def test_memory_is_kept_busy_by_few_tokens() -> None:
    wanted = device_class("sm_90").in_flight_nbytes
    for n, k in ((1024, 1024), (3072, 1024), (1024, 4096), (5120, 5120), (640, 640)):
        template = GemmTemplate(torch.bfloat16, n, k)
        s = choose_tiles(template, 40, "sm_90")
        steps = min(s.num_stages - 1, -(-k // s.k_tile // s.splits))
        held = -(-n // s.n_tile) * s.splits * steps * s.n_tile * s.k_tile * 2
        assert held >= min(wanted, n * k * 2), (n, k, s)


def test_sums_are_split_as_far_as_there_is_room() -> None:
    tiles = Tiles((("gemm_*", "m64n64x8"),), "sm_90", {}, "triton")
    for tokens, splits in ((40, 8), (100, 4), (500, 1), (5000, 1)):
        schedule = tiles.gemm(GEMM, tokens)
        assert schedule is not None and schedule.splits == splits, tokens


def test_attention_takes_what_was_tuned_for_its_number_of_queries() -> None:
    tuned = {structure_of(ATTENTION): {"64": "k32"}}
    tiles = Tiles((), "sm_90", tuned)
    assert tiles.attention(ATTENTION, 40).k_tile == 32
    assert tiles.attention(ATTENTION, 65) == choose_attention_schedule(ATTENTION, 65)
    asked = Tiles((("attention_*", "w2"),), "sm_90", tuned).attention(ATTENTION, 40)
    assert (asked.num_warps, asked.k_tile) == (2, 32)


@pytest.mark.parametrize("tokens", [16, 300])
@pytest.mark.parametrize("gated", [False, True])
def test_neighbours_fit_the_device(tokens: int, gated: bool) -> None:
    template = replace(GEMM, gated=gated)
    device = device_class("sm_90")
    seen: set[GemmSchedule | None] = set()
    todo: list[GemmSchedule | None] = [None]
    while todo:
        schedule = todo.pop()
        if schedule not in seen:
            seen.add(schedule)
            todo += gemm_neighbours(template, schedule, tokens, "sm_90")
    assert None in seen and len(seen) > 50
    for s in seen - {None}:
        assert s.m_tile * s.n_tile * (1 + gated) <= MOST_SUMS * 32 * s.num_warps
        assert shared_nbytes(template, s) <= device.shared_nbytes
        assert fits_scratch(template, s, 512 if tokens > 16 else 16)
    assert len(attention_neighbours(choose_attention_schedule(ATTENTION, 100))) >= 6


def test_options_know_the_words() -> None:
    Options(gemms="triton", pdl=True, schedules={"gemm_*": "cublas", "attention*": "q32k64s1"})
    Options(schedules={"gemm_*": "m64n32k128w4s5x1l0p2"})
    with pytest.raises(OptionsError, match="gemms='mkl' is not one of 'auto', 'cublas', 'triton'"):
        Options(gemms="mkl")
