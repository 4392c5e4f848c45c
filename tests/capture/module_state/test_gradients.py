"""Which parameters require gradients is a guard where forward asks, and costs nothing elsewhere."""

from __future__ import annotations

import torch
from torch import nn

import turbotx


class Frozen(nn.Module):
    """Asks its parameters, and those of a part, whether they require gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.part = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

    def forward(self, x):
        x = x * 3 if self.scale.requires_grad else x
        return self.part(x) if all(p.requires_grad for p in self.part.parameters()) else x - 1


def test_whether_parameters_have_gradients_is_a_guard() -> None:
    model, x = Frozen().eval(), torch.randn(2, 4)
    fast = turbotx.optimize(model, backend="aten")

    def called(captures: int) -> None:
        torch.testing.assert_close(fast(x), model(x))
        assert fast.stats()["captures"] == captures

    called(1)
    model.scale.requires_grad_(False)
    called(2)
    model.part.bias.requires_grad_(False)
    called(3)
    model.scale = nn.Parameter(torch.ones(4))
    called(4)
    model.requires_grad_(True)
    called(4)
