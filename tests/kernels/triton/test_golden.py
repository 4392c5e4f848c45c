"""The text of representative printed kernels, as files in tests/golden/triton.

In: functions, captured and fused. Out: their Triton source, compared letter by letter; with
TURBOTX_UPDATE_GOLDEN=1 in the environment the files are written anew, to be read in the diff.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import pytest
import torch

from tests.compiled_functions import compile_function
from tests.kernels.fusion.test_fuse import grouped_rotary
from turbotx import ir
from turbotx.ir.matmul_kernels import AttentionKernel, ProductKernel
from turbotx.kernels.schedule import Schedule, choose_schedule
from turbotx.kernels.triton.attention import print_triton_attention
from turbotx.kernels.triton.gemm import print_triton_gemm
from turbotx.kernels.triton.gemm_template import GemmSchedule, GemmTemplate
from turbotx.kernels.triton.printer import print_triton
from turbotx.kernels.triton.products import print_triton_product

GOLDEN = Path(__file__).parents[2] / "golden" / "triton"
F = torch.nn.functional


def fused(function, *inputs) -> ir.Kernel:
    (kernel,) = compile_function(function, *inputs).kernels
    return kernel


def add_layer_norm() -> str:
    x, y, bias, weight = (
        torch.ones(2, 3, 384),
        torch.ones(2, 3, 384),
        torch.ones(384),
        torch.ones(384),
    )
    norm = fused(
        lambda x, bias, y, weight: F.layer_norm(x + bias + y, (384,), weight), x, bias, y, weight
    )
    return print_triton(norm)


def gelu() -> str:
    return print_triton(fused(lambda x, b: F.gelu(x + b), torch.ones(2, 3, 1536), torch.ones(1536)))


def swiglu() -> str:
    x = torch.ones(2, 3, 2048)
    return print_triton(fused(lambda x: F.silu(x[..., :1024]) * x[..., 1024:], x))


def rms_norm_of_short_rows() -> str:
    return print_triton(fused(lambda x: F.rms_norm(x, (64,)), torch.ones(2, 3, 64)))


def embedding() -> str:
    table, ids = torch.ones(100, 256), torch.ones(2, 3, dtype=torch.long)
    return print_triton(fused(lambda ids, table: F.embedding(ids, table) * 16, ids, table))


def softmax_of_any_length() -> str:
    return print_triton(fused(lambda x: x.softmax(-1), torch.ones(2, 3)))


def softmax_looped() -> str:
    kernel = fused(lambda x: x.softmax(-1), torch.ones(2, 3))
    dims = {n: 70000 if n == "seq" else 3 for n in kernel.sizes}
    return print_triton(kernel, choose_schedule(kernel, dims))


def sum_over_the_first_axis() -> str:
    return print_triton(fused(lambda x: x.sum(0), torch.ones(40, 384)))


def transposed_heads() -> str:
    x = torch.ones(2, 5, 4, 64)
    return print_triton(fused(lambda x: x.permute(0, 2, 1, 3).contiguous() * 0.125, x))


def rotary_of_grouped_heads() -> str:
    return print_triton(
        fused(grouped_rotary, torch.ones(2, 3, 64), torch.ones(3, 8), torch.ones(3, 8))
    )


def wide_offsets() -> str:
    kernel = fused(lambda x: x.tanh(), torch.ones(2, 3))
    return print_triton(kernel, Schedule(1, 1024, wide=True))


def masked_softmax() -> str:
    def function(scores, hidden):
        return torch.ops.aten._safe_softmax((scores * 0.125).masked_fill(hidden, -math.inf), -1)

    scores, hidden = torch.ones(2, 4, 7, 7), torch.zeros(2, 1, 1, 7, dtype=torch.bool)
    return print_triton(fused(function, scores, hidden))


def flash_attention() -> str:
    attention = AttentionKernel(torch.float16, 64, 0.125, True, keys="mask")
    return print_triton_attention(attention)


def attention_scores() -> str:
    return print_triton_product(ProductKernel("scores", torch.float16, 64))


def gemm_of_a_folded_norm() -> str:
    template = GemmTemplate(torch.float16, 3072, 768, True, "gelu", norm="layer", scaled=True)
    return print_triton_gemm(template, GemmSchedule(64, 32, 128, stat_tile=32))


def gemm_in_parts() -> str:
    template = GemmTemplate(torch.bfloat16, 100, 1000, gated=True, activation="silu", stats=True)
    return print_triton_gemm(template, GemmSchedule(16, 32, 64, splits=4))


CASES = (
    add_layer_norm, gelu, swiglu, rms_norm_of_short_rows, embedding, softmax_of_any_length,
    softmax_looped, sum_over_the_first_axis, transposed_heads, wide_offsets, masked_softmax,
    flash_attention, rotary_of_grouped_heads, attention_scores, gemm_of_a_folded_norm,
    gemm_in_parts,
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_text(case) -> None:
    path = GOLDEN / f"{case.__name__}.py"
    text = re.sub(r"(test_\w+\.py):\d+", r"\1:LINE", case())  # editing a file changes no kernel
    if os.environ.get("TURBOTX_UPDATE_GOLDEN") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{path.name} differs: TURBOTX_UPDATE_GOLDEN=1 rewrites it"


def test_every_golden_file_has_its_case() -> None:
    assert {p.stem for p in GOLDEN.glob("*.py")} == {c.__name__ for c in CASES}
