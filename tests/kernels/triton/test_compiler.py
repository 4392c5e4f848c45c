"""Kernels compiled for GPUs that are not there: artifacts, resources, cache and errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from turbotx import ir
from turbotx.errors import BuildError
from turbotx.ir.expr import dim
from turbotx.kernels.schedule import Schedule
from turbotx.kernels.triton import compiler as targets
from turbotx.kernels.triton.compiler import TARGETS, build, kernel_job


def scale(dtype: torch.dtype = torch.float32, width: int = 256) -> ir.Kernel:
    rows = dim("rows")
    axes = (ir.Axis("row", rows), ir.Axis("col", dim("n") * 0 + width))
    place = axes[0].symbol * width + axes[1].symbol
    compute = torch.float32
    return ir.Kernel(
        "scale",
        (ir.Param("x", dtype, (rows, width), "in"), ir.Param("y", dtype, (rows, width), "out")),
        axes,
        (
            ir.Load("a", ir.Access("x", place), compute),
            ir.Constant("c", 2.0, compute),
            ir.Compute("b", "mul", ("a", "c"), compute),
            ir.Store(ir.Access("y", place), "b"),
        ),
    )


def test_artifacts_and_resources_for_every_target() -> None:
    seen: list[tuple[int, int, str]] = []
    jobs = [kernel_job(scale(), target) for target in TARGETS]
    built = build(jobs, workers=2, progress=lambda *step: seen.append(step))
    assert [b.job.target for b in built] == list(TARGETS)
    for b in built:
        kinds = ("amdgcn", "hsaco") if b.job.target == "gfx942" else ("ptx", "cubin")
        assert {"py", "ttir", *kinds} <= set(b.files)
        assert b.resources.load_bits == b.resources.store_bits == 128
        assert b.resources.spills == 0
        assert 0 < b.resources.registers < 64
        assert b.resources.instructions > 10
    assert sorted(done for done, _, _ in seen) == [1, 2, 3, 4]
    assert all(total == 4 for _, total, _ in seen)


def test_a_second_build_reads_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    job = kernel_job(scale(torch.float16), "sm_90")
    (first,) = build([job])
    monkeypatch.setattr(targets, "compile_job", lambda *_: pytest.fail("compiled again"))
    (second,) = build([job])
    assert second.cached and second.files == first.files
    assert second.resources == first.resources


def test_equal_jobs_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    job = kernel_job(scale(width=512), "sm_90")
    calls = []
    compile_one = targets.compile_job
    monkeypatch.setattr(
        targets, "compile_job", lambda *args: (calls.append(1), compile_one(*args))[1]
    )
    assert len(build([job, job])) == 2
    assert len(calls) == 1


def test_digest_covers_everything_that_shapes_the_binary() -> None:
    job = kernel_job(scale(), "sm_90")
    others = [
        dataclasses.replace(job, target="sm_80"),
        dataclasses.replace(job, num_warps=8),
        dataclasses.replace(job, divisible=()),
        dataclasses.replace(job, constexprs=(("COLS", 128),)),
        dataclasses.replace(job, source=job.source + "\n"),
    ]
    assert len({j.digest() for j in [job, *others]}) == 6
    moved = dataclasses.replace(job, source="# computes model.py:12\n" + job.source)
    assert moved.digest() == job.digest()


def test_without_alignment_loads_are_narrow() -> None:
    job = dataclasses.replace(kernel_job(scale(), "sm_90"), divisible=())
    (built,) = build([job])
    assert built.resources.load_bits == 32


def test_refused_source_is_an_error_with_the_compilers_words() -> None:
    job = kernel_job(scale(), "sm_90")
    wrong = dataclasses.replace(job, source=job.source.replace("tl.load(", "tl.lode("))
    with pytest.raises(BuildError, match="scale for sm_90") as caught:
        build([wrong])
    assert "lode" in str(caught.value)


def test_amd_warps_are_twice_as_wide() -> None:
    schedule = Schedule(1, 256, num_warps=8)
    assert kernel_job(scale(), "gfx942", schedule).num_warps == 4
    assert kernel_job(scale(), "sm_90", schedule).num_warps == 8
