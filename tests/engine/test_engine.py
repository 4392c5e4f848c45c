"""The engine's calls as PyTorch's own tools see them."""

from __future__ import annotations

import torch
from torch import nn

import turbotx


def test_a_profile_of_pytorch_names_the_calls() -> None:
    fast = turbotx.optimize(nn.Linear(4, 3).eval())
    x = torch.randn(2, 4)
    fast(x)
    with torch.profiler.profile() as profile:
        fast(x)
    assert [e.count for e in profile.key_averages() if e.key == "turbotx: Linear"] == [1]
