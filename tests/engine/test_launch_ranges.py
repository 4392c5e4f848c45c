"""Launch ranges: what torch.profiler shows of a call, with each launch and without."""

from __future__ import annotations

import torch
from torch import nn

import turbotx


def ranges(**options: bool) -> list[str]:
    """The ranges of one call that are turbotx's own."""
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8)).eval()
    fast = turbotx.optimize(model, **options)
    x = torch.randn(2, 4)
    fast(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.testing.assert_close(fast(x), model(x))
    found = (e.name for e in profile.events())
    return [name for name in found if name.startswith(("turbotx: ", "linear_", "fused_"))]


def test_a_call_is_one_range_and_each_launch_another_where_asked() -> None:
    assert ranges() == ["turbotx: Sequential"]
    launches = ["linear_0", "fused_add_gelu_layer_norm_0"]
    assert ranges(launch_ranges=True) == ["turbotx: Sequential", *launches]
    assert ranges(launch_ranges=True, backend="aten") == ["turbotx: Sequential", *launches]
