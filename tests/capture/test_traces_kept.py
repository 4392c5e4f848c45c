"""What a capture leaves in the process: nothing of its trace, and nothing of a model given up."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import turbotx
from tests.models import small_model, token_inputs
from turbotx.errors import CaptureError


def of_traces() -> int:
    """Return how many fake tensors and shape environments are alive."""
    gc.collect()
    return sum(issubclass(type(x), (FakeTensor, ShapeEnv)) for x in gc.get_objects())


class Refused(nn.Module):
    """Fails behind some ops."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x).view(x.shape[0] * x.shape[1], 8)
        return x * float(x.sum())


def call(model: nn.Module, inputs: dict[str, Any], **options: Any) -> None:
    fast = turbotx.optimize(model, **options)
    for _ in range(2):
        fast(**inputs)


GIVEN_UP = [("bert", {}), ("bert", {"keep_weights": False}), ("llama", {"backend": "aten"})]


@pytest.mark.parametrize(("architecture", "options"), GIVEN_UP, ids=str)
def test_a_model_that_is_given_up_is_freed(architecture: str, options: dict[str, Any]) -> None:
    before = of_traces()
    model = small_model(architecture)
    memory = [weakref.ref(p.untyped_storage()) for p in model.parameters()]
    left = weakref.ref(model)
    call(model, token_inputs(2, 9), **options)
    del model
    assert of_traces() <= before
    assert left() is None and not any(m() is not None for m in memory)


def test_a_trace_that_failed_is_freed() -> None:
    before, model = of_traces(), Refused().eval()
    memory = weakref.ref(model.linear.weight.untyped_storage())
    with pytest.raises(CaptureError):
        call(model, {"x": torch.randn(2, 3, 8)}, backend="aten")
    del model
    assert of_traces() <= before and memory() is None


class Bounded(nn.Module):
    """Branches on numbers that tensors hold, as XLM does on its lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert torch.isfinite(x).all()
        y = self.layer(x) if x.abs().max().item() < 50 else x
        return y if y.shape[1] > 2 and y.sum().item() < 1e4 else y * 2


def test_a_model_that_asks_for_values_is_freed() -> None:
    before = of_traces()
    model = Bounded().eval()
    left, fast = weakref.ref(model), turbotx.optimize(model)
    for factor in (1.0, 1e3):
        fast(torch.randn(2, 5, 8) * factor)
    assert fast.stats()["captures"] == 2
    del model, fast
    assert of_traces() == before
    assert left() is None
