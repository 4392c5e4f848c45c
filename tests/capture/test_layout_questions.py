"""Questions about an input's layout are answered as in eager mode, also at sizes of 1."""

from __future__ import annotations

import pytest
import torch

import turbotx

QUESTIONS = {
    "contiguous": lambda x: x.is_contiguous(),
    "contiguous, turned": lambda x: x.transpose(0, 1).is_contiguous(),
    "of one element": lambda x: x[:, 0].is_contiguous(),
    "stride": lambda x: x.transpose(0, 1).stride(0) == 8,
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_answer_is_the_calls_own(name: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if QUESTIONS[name](x) else x + 1

    fast = turbotx.optimize(function, backend="aten")
    for shape in ((2, 5, 8), (2, 1, 8), (1, 5, 8), (1, 1, 8), (3, 4, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(fast(x), function(x), rtol=0, atol=0)
