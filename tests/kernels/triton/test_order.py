"""In which order a compiled GEMM asks for memory and waits, read from its machine code.

In: the GEMMs of a BERT layer at 40 tokens. Out: what comes before the first request for the weight.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.kernels.triton.gemm_jobs import job_of
from turbotx.kernels.gemm_heuristics import choose_tiles
from turbotx.kernels.triton.compiler import Built, build
from turbotx.kernels.triton.gemm_template import GemmTemplate
from turbotx.kernels.triton.resources import find_tool

UP = GemmTemplate(
    torch.float16, 3072, 768, bias=True, activation="gelu", norm="layer", scaled=True
)  # fmt: skip
OUT = GemmTemplate(
    torch.float16, 768, 768, bias=True, residual=True, residual_norm="layer", stats=True
)


def instructions(built: Built) -> list[str]:
    command = [find_tool("nvdisasm"), "-c", str(built.files["cubin"])]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", text, re.M)


@pytest.mark.parametrize("late", [0, 1])
def test_statistics_do_not_keep_the_weight_waiting(late: int) -> None:
    tiles = replace(choose_tiles(UP, 40, "sm_90"), late=late)
    (built,) = build([job_of(UP, 40, "sm_90", tiles, stat_tile=32)])
    code = instructions(built)
    before = code[: next(i for i, op in enumerate(code) if op.startswith("LDGSTS"))]
    waits = [op for op in before if op.startswith(("SHFL", "BAR"))]
    assert bool(waits) == (not late)
    assert built.resources.spills == 0


def test_a_residual_is_asked_for_before_the_sums() -> None:
    tiles = replace(choose_tiles(OUT, 40, "sm_90"), splits=1)
    (built,) = build([job_of(OUT, 40, "sm_90", tiles, stat_tile=32)])
    code = instructions(built)
    product = next(i for i, op in enumerate(code) if "MMA" in op)
    loads = [i for i, op in enumerate(code) if op.split(".")[0] == "LDG"]
    assert loads and max(loads) < product
    assert built.resources.spills == 0
