"""Gradient and inference mode that the model's own code sets: it is told what it has set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import turbotx
from turbotx.errors import CaptureError


def asks() -> float:
    return 2.0 * torch.is_grad_enabled() + 5.0 * torch.is_inference_mode_enabled() + 1.0


def no_grad(x: torch.Tensor) -> Any:
    with torch.no_grad():
        y = x * asks()
    return y, asks(), x * 2


def enable_grad(x: torch.Tensor) -> Any:
    with torch.enable_grad():
        y = x.cumsum(0) * asks()
        with torch.no_grad():
            z = y + asks()
        z = z * asks()
    return y, z, asks()


def inference_mode(x: torch.Tensor) -> Any:
    with torch.inference_mode():
        y = x * asks()
        with torch.inference_mode(False), torch.no_grad():
            y = y - asks()
        y = y.softmax(-1) * asks()
    return y, asks(), y + 1


def set_grad_enabled(x: torch.Tensor) -> Any:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    y = x * asks()
    torch.set_grad_enabled(before)
    return y, asks()


@torch.inference_mode()
def decorated(x: torch.Tensor) -> Any:
    return x * asks(), torch.enable_grad()(lambda: x + asks())()


class Layers(nn.Module):
    """Layers in all modes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> Any:
        with torch.no_grad():
            y = self.linear(x)
        with torch.enable_grad():
            z = self.linear(y) * asks()
        with torch.inference_mode():
            w = self.linear(x) * asks()
        return y, z, w, asks()


FUNCTIONS: tuple[Callable[[torch.Tensor], Any], ...] = (
    no_grad, enable_grad, inference_mode, set_grad_enabled, decorated, Layers().eval(),
)  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: getattr(f, "__name__", "layers"))
def test_code_is_told_what_it_has_set(function: Callable[[torch.Tensor], Any]) -> None:
    fast = turbotx.optimize(function, backend="aten")
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode, torch.enable_grad):
        for n in (3, 1):
            x = torch.randn(n, 3)
            with mode():
                came, wanted = fast(x), function(x)
                assert torch.is_grad_enabled() == (mode is torch.enable_grad)
            for a, b in zip(came, wanted, strict=True):
                torch.testing.assert_close(a, b)
        assert torch.is_grad_enabled()


def test_an_error_inside_leaves_the_modes_as_they_were() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad(), torch.inference_mode():
            raise ValueError("no")

    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            with pytest.raises(CaptureError, match="ValueError: no"):
                turbotx.optimize(function, backend="aten")(torch.ones(3))
            assert torch.is_grad_enabled() == mode and not torch.is_inference_mode_enabled()
