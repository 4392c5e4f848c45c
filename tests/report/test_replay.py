"""A report is measured on inputs of its own call; others are refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import turbotx
from turbotx.errors import InputError


def test_inputs_of_another_call_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU()).eval()
    report = turbotx.explain(turbotx.optimize(model, backend="aten"), torch.randn(2, 3, 8))
    assert report.profile(torch.randn(4, 5, 8), runs=1).launches
    for other, why in ((torch.randn(3, 8), "ranks are"), (torch.randn(2, 3, 9), "8")):
        for measure in (report.stress, report.profile):
            with pytest.raises(InputError, match=f"another call: .*{why}"):
                measure(other)
