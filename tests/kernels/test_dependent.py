"""Programmatic dependent launch: what is written into kernels, and what it is compiled to.

In: a small GEMM for several targets. Out: its source, and grid dependency control in its PTX.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from turbotx.kernels.dependent import can_depend, make_dependent
from turbotx.kernels.gemm_choice import choose_gemm
from turbotx.kernels.gemm_template import GemmTemplate
from turbotx.kernels.targets import build

TEMPLATE = GemmTemplate(torch.float16, 64, 64, bias=True, activation="gelu_tanh")


def test_targets_from_hopper_on() -> None:
    assert [can_depend(t) for t in ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")] == [
        False, False, True, True, False,
    ]  # fmt: skip


def test_a_kernel_waits_before_anything_else() -> None:
    job = choose_gemm(TEMPLATE, 16, "sm_90").job
    made = make_dependent(job)
    assert made.digest() != job.digest()
    body = made.source.split(f"def {job.name}(")[1].split("):\n", 1)[1]
    assert [line.strip() for line in body.splitlines()[1:3]] == [
        "gdc_wait()", "gdc_launch_dependents()",
    ]  # fmt: skip
    (built,) = build([made])
    ptx = built.files["ptx"].read_text()
    wait = ptx.index("griddepcontrol.wait")
    assert wait < ptx.index("griddepcontrol.launch_dependents") < ptx.index("ld.global")
    assert built.resources.spills == 0
