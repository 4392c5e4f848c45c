"""Modules that forward converts to what they are already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import turbotx
from turbotx.capture.idle_conversions import idle_conversions
from turbotx.errors import CaptureError


class Converting(nn.Module):
    def __init__(self, convert: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.convert = convert
        self.inner, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        self.convert(self, x)
        return self.norm(self.inner(x))


def set_again(model: Any, x: Tensor) -> None:
    model.inner = model.inner.to(x.dtype)


@pytest.mark.parametrize(
    "convert",
    [set_again, lambda model, x: model.inner.float(), lambda model, x: model.to(x.device)],
)
def test_a_conversion_that_changes_nothing(convert: Callable[[Any, Tensor], Any]) -> None:
    model = Converting(convert).eval()
    fast = turbotx.optimize(model)
    for rows in (3, 5):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(fast(x), model(x))
    assert fast.stats()["captures"] == 1


def test_a_conversion_that_changes_the_model_is_refused() -> None:
    model = Converting(lambda model, x: model.inner.bfloat16()).eval()
    with pytest.raises(CaptureError, match=r"forward converts Linear\.weight to another dtype"):
        turbotx.optimize(model)(torch.randn(3, 8))
    assert model.inner.weight.dtype == torch.float32


def test_conversions_outside_of_a_trace_are_pytorchs() -> None:
    with idle_conversions():
        assert nn.Linear(2, 2).half().weight.dtype == torch.float16
