"""Programmatic dependent launch: what is written into kernels, and what it is compiled to.

In: small GEMMs. Out: their source, grid dependency control in their PTX, and which addresses they
ask for before they wait.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

import triton.language as tl

from tests.kernels.triton.gemm_jobs import job_of
from tests.kernels.triton.triton_runner import interpreting, load_function
from turbotx.kernels.gemm_heuristics import choose_tiles, gemm_job
from turbotx.kernels.triton.compiler import build
from turbotx.kernels.triton.dependent import MARK, can_depend, make_dependent
from turbotx.kernels.triton.gemm_template import (
    GemmSchedule,
    GemmTemplate,
    gemm_arguments,
    gemm_grid,
)
from turbotx.kernels.triton.prefetch import LINE_NBYTES, MOST_NBYTES

TEMPLATE = GemmTemplate(torch.float16, 64, 512, bias=True, activation="gelu_tanh")
WAIT = ["gdc_wait()", "gdc_launch_dependents()"]
SMALL = GemmSchedule(16, 16, 16)


def test_targets_from_hopper_on() -> None:
    assert [can_depend(t) for t in ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")] == [
        False, False, True, True, False,
    ]  # fmt: skip


def test_a_kernel_waits_before_anything_else() -> None:
    job = job_of(TEMPLATE, 16, "sm_90")
    job = replace(job, source=job.source.replace(MARK, ""))
    made = make_dependent(job)
    body = made.source.split(f"def {job.name}(")[1].split("):\n", 1)[1]
    assert [line.strip() for line in body.splitlines()[1:3]] == WAIT


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_a_gemm_asks_for_its_weight_and_waits_before_it_reads(prefetch: int) -> None:
    tiles = replace(choose_tiles(TEMPLATE, 16, "sm_90"), prefetch=prefetch)
    job = job_of(TEMPLATE, 16, "sm_90", tiles)
    made = make_dependent(job)
    assert made.digest() != job.digest() == replace(job, before_wait="").digest()
    (built,) = build([made])
    ptx = built.files["ptx"].read_text()
    wait = ptx.index("griddepcontrol.wait")
    assert wait < ptx.index("griddepcontrol.launch_dependents")
    asked = {0: "", 1: "prefetch.global.L2", 2: "cp.async.bulk.prefetch.L2"}[prefetch]
    assert ("prefetch" in ptx[:wait]) == (prefetch > 0) and asked in ptx[:wait]
    read = ("ld.global", "cp.async.cg", "cp.async.ca", "st.global", "atom.", "red.")
    assert "cp.async.cg" in ptx
    assert not any(op in ptx[:wait] for op in read)
    assert built.resources.spills == 0


def asked_for(
    template: GemmTemplate, schedule: GemmSchedule, tokens: int, w: torch.Tensor,
    patch: pytest.MonkeyPatch,
) -> list[tuple[int, int]]:  # fmt: skip
    """Return the addresses and lengths of a GEMM's requests, of all its programs together."""
    job = gemm_job(template, "sm_90", schedule)
    source = job.source[: job.source.index(f"    {MARK}")] + job.before_wait
    found: list[tuple[int, int]] = []

    def request(asm: str, constraints: str, args: list[Any], **_: Any) -> None:
        given = [getattr(a, "handle", None) for a in args]
        data = [a if h is None else h.data for a, h in zip(args, given, strict=True)]
        if "bulk" in asm:
            address, size, thread = (int(np.ravel(d)[0]) for d in data)
            assert thread % 32 == 0 and thread < 32 * schedule.num_warps
            found.append((address, size))
        else:
            address, wanted = torch.broadcast_tensors(*(torch.tensor(d) for d in data))
            found.extend((a, LINE_NBYTES) for a in address[wanted != 0].tolist())

    patch.setattr(tl, "inline_asm_elementwise", request)
    empty = torch.zeros(1)
    sizes = {"tokens": tokens, "x_row": template.k, "out_row": template.n}
    sizes["w_row"] = w.stride(1) if template.flipped else w.stride(0)
    named: dict[str, Any] = {"w_ptr": w} | sizes
    args = [named.get(name, empty) for name, _ in gemm_arguments(template, schedule)]
    tiles = {f"{x}_TILE": getattr(schedule, f"{x.lower()}_tile") for x in "MNK"}
    with interpreting():
        load_function(source, template.name)[gemm_grid(template, schedule, tokens)](*args, **tiles)
    return found


@pytest.mark.parametrize("prefetch", [1, 2])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "gated", "splits"),
    [(40, 200, False, 1), (40, 200, True, 3), (16, 33, False, 1), (33, 96, False, 2)],
)
def test_only_the_weight_and_all_of_it_is_asked_for(
    n: int, k: int, gated: bool, splits: int, flipped: bool, prefetch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    template = GemmTemplate(torch.float16, n, k, gated=gated, flipped=flipped)
    rows = n * (1 + gated)
    w = torch.zeros(k, rows).half().t() if flipped else torch.zeros(rows, k).half()
    schedule = replace(SMALL, splits=splits, prefetch=prefetch)
    asked = asked_for(template, schedule, 20, w, monkeypatch)
    begin, end = w.data_ptr(), w.data_ptr() + w.numel() * 2
    assert all(begin <= a < end for a, _ in asked)
    if prefetch == 2 and not flipped and k % 8 == 0:
        assert sum(size for _, size in asked) == w.numel() * 2
        assert all(a + size <= end for a, size in asked)
        assert all(a % 2 == 0 and size % 16 == 0 for a, size in asked)
    held = {a for at, size in asked for a in range(at, at + size, 2)}
    assert held >= set(range(begin, end, 2))


def test_no_more_than_a_bound_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    template, w = GemmTemplate(torch.float16, 16, 5000), torch.zeros(16, 5000).half()
    asked = asked_for(template, SMALL, 3, w, monkeypatch)
    assert MOST_NBYTES / 2 < sum(size for _, size in asked) <= MOST_NBYTES
