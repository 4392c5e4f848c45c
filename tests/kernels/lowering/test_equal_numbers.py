"""Rows of equal numbers: their mean is that number, to the last bit, and nothing deviates from it.

In: norms, by torch and by hand, over rows of one number each. Out: exact zeros where eager's own
LayerNorm has them, in C++ and in Triton, and no NaN from the root of a rounded zero.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.compiled_functions import CppRunner, compile_function
from tests.kernels.cpp.cpp_probe import needs_compiler

WIDTHS = (2, 7, 96, 250)


def norms(x: torch.Tensor) -> list[torch.Tensor]:
    away = x - x.mean(-1, keepdim=True)
    return [
        F.layer_norm(x, x.shape[-1:]),
        F.group_norm(x[:, None], 1),
        away / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt(),
        away * torch.rsqrt(away.pow(2).mean(-1, keepdim=True) + 1e-6),
        x.var(-1),
        x.std(-1, correction=0),
    ]


def down(x: torch.Tensor) -> list[torch.Tensor]:
    var, mean = torch.var_mean(x.T, 0)
    return [(x.T - mean) * torch.rsqrt(var + 1e-5), var.sqrt()]


def equal_rows(width: int, count: int = 300) -> torch.Tensor:
    scale = torch.tensor([1.0, 30.0, 1e4, 1e-3, 1e-22, 1e30]).repeat(count // 6)
    return (torch.randn(count) * scale)[:, None].expand(count, width).contiguous()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [norms, down])
def test_cpp(function, dtype: torch.dtype) -> None:
    """Of any width, and of one that is known: then sums are made of blocks."""
    anywhere = compile_function(function, torch.randn(3, 5).to(dtype))
    known = {
        width: compile_function(lambda x, b: function(x + b), x, torch.zeros(width, dtype=dtype))
        for width in WIDTHS
        for x in [torch.randn(3, width).to(dtype)]
    }
    run = CppRunner([anywhere, *known.values()])
    for width in WIDTHS:
        x = equal_rows(width).to(dtype)
        for made, given in ((anywhere, (x,)), (known[width], (x, torch.zeros(width, dtype=dtype)))):
            for k, result in enumerate(made.run(given, run)):
                assert torch.equal(result, torch.zeros_like(result)), f"output {k} at {width}"


@pytest.mark.parametrize("width", [3, 40])
def test_triton(width: int) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux only")
    from tests.kernels.triton.triton_runner import TritonRunner

    x = equal_rows(width, 12)
    made = compile_function(norms, torch.randn(3, 5))
    *exact, var, std = made.run((x,), TritonRunner())
    for k, result in enumerate(exact):
        assert torch.equal(result, torch.zeros_like(result)), f"output {k}"
    tiny = 1e-12 * x[:, 0].abs()
    assert (var.abs() <= tiny**2).all()
    assert (std <= tiny).all()
