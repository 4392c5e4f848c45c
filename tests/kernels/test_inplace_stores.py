"""A kernel that may write over its input reads it once only, through the whole pipeline."""

from __future__ import annotations

import torch
from torch import nn

import turbotx
from tests.kernels.cpp_probe import needs_compiler


class SharedProducer(nn.Module):
    """The product is read for every batch by one output, and once by the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = self.first(x).tanh()
        return self.second(wide * 2), wide + t


@needs_compiler
def test_an_output_smaller_than_the_loops() -> None:
    model = SharedProducer().eval()
    x, t = torch.randn(5, 8), torch.randn(3, 5, 8)
    with torch.no_grad():
        expected = model(x, t)
        for ours, eager in zip(turbotx.optimize(model)(x, t), expected, strict=True):
            torch.testing.assert_close(ours, eager)
