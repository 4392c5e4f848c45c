"""Printed C++: golden text of representative kernels; that it runs is in test_cpp_numerics.

In: small functions. Out: their kernels as tests/golden/cpp/NAME.cpp has them. After a change that
is meant, write them anew and read the difference::

    TURBOTX_UPDATE_GOLDEN=1 pytest tests/kernels/cpp/test_printer.py
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import turbotx
from tests.compiled_functions import compile_function
from tests.kernels.fusion.test_fuse import grouped_rotary
from turbotx.kernels.cpp.printer import print_kernel
from turbotx.kernels.cpp.text import literal, var

GOLDEN = Path(__file__).parents[2] / "golden" / "cpp"


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin


class Norm(torch.nn.Module):
    """Residual and LayerNorm of a known width, as in an encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(384)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.norm(x + y)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


CASES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "bias_gelu": (lambda x, b: F.gelu(x + b), (randn(2, 3, 8), randn(8))),
    "add_layer_norm": (Norm(), (randn(2, 3, 384), randn(2, 3, 384))),
    "masked_softmax": (
        lambda x, m: (x * 0.125).masked_fill(m, -torch.inf).softmax(-1),
        (randn(2, 4, 3, 5), torch.zeros(2, 1, 1, 5, dtype=torch.bool)),
    ),
    "rms_norm_bf16": (
        lambda x, w: w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        (randn(2, 6, dtype=torch.bfloat16), randn(6, dtype=torch.bfloat16)),
    ),
    "swiglu": (lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], (randn(3, 8),)),
    "rotary": (rotary, (randn(2, 3, 4, 8), randn(4, 8), randn(4, 8))),
    "mean_pool": (
        lambda x, m: (x * m.unsqueeze(-1)).sum(1) / m.sum(1, keepdim=True).clamp(min=1e-9),
        (randn(2, 3, 8), randn(2, 3)),
    ),
    "embedding_sum": (
        lambda t, p, i: F.embedding(i, t) + p[: i.shape[1]],
        (randn(11, 4), randn(7, 4), torch.zeros(2, 3, dtype=torch.long)),
    ),
    "argmax": (lambda x: x.argmax(-1), (randn(3, 5),)),
    "split_heads": (
        lambda x: x.view(x.shape[0], x.shape[1], 2, 4).permute(0, 2, 1, 3) * 2,
        (randn(2, 3, 8),),
    ),
    "roll": (lambda x: x.roll(1, 0), (randn(5, 3),)),
    "grouped_rotary": (
        grouped_rotary,
        (torch.randn(2, 3, 64), torch.randn(3, 8), torch.randn(3, 8)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_golden_text(name: str) -> None:
    function, inputs = CASES[name]
    made = compile_function(function, *inputs)
    text = "\n".join(print_kernel(kernel) for kernel in made.kernels)
    text = re.sub(r"(test_\w+\.py):\d+", r"\1:LINE", text)  # editing a file changes no kernel
    file = GOLDEN / f"{name}.cpp"
    if os.environ.get("TURBOTX_UPDATE_GOLDEN") == "1":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


def test_literals() -> None:
    assert literal(0.5, torch.float32) == "0.5f"
    assert literal(1e-12, torch.float64) == "1e-12"
    assert literal(float("-inf"), torch.float32) == "-std::numeric_limits<float>::infinity()"
    assert literal(float("nan"), torch.bfloat16) == "std::numeric_limits<ttx::bf16>::quiet_NaN()"
    assert literal(3, torch.int8) == "int8_t(3)"
    assert literal(-(2**63), torch.int64) == "std::numeric_limits<int64_t>::min()"
    assert literal(True, torch.bool) == "true"


def test_names_are_identifiers() -> None:
    assert [var(n) for n in ("and", "sub", "double", "end")] == ["and_", "sub", "double_", "end_"]


def test_blocks_that_divide_the_width_and_blocks_that_do_not() -> None:
    for width in (4095, 8192, 12289, 16384):
        linear = torch.nn.Linear(4, width).eval()

        def function(x, linear=linear):
            y = linear(x)
            return y.tanh() * 2, y.softmax(-1)

        x = torch.randn(3, 4)
        with torch.no_grad():
            for ours, theirs in zip(turbotx.optimize(function)(x), function(x), strict=True):
                torch.testing.assert_close(ours, theirs)
