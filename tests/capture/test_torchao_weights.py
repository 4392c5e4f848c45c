"""What of torchao's weights is understood, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import turbotx
from tests.torchao_weights import quantize
from turbotx.capture.torchao_weights import is_torchao, read_integers
from turbotx.errors import CaptureError


@pytest.mark.parametrize("float_rows", [True, False])
def test_integers_and_scales_are_read(float_rows: bool) -> None:
    linear: Any = quantize("stand-in", nn.Linear(6, 3), float_rows)
    rows = read_integers(linear.weight)
    assert rows is not None and rows.scheme.float_rows is float_rows
    assert rows.numbers is linear.weight.qdata and rows.scale.shape == (3, 1)
    assert torch.equal(rows.numbers * rows.scale, linear.weight.dequantize())
    assert not is_torchao(nn.Linear(2, 2).weight) and read_integers(torch.ones(2)) is None


def grouped(weight: Any) -> None:
    weight.block_size = [1, 3]


def shifted(weight: Any) -> None:
    weight.zero_point = weight.zero_point + 1


def static(weight: Any) -> None:
    weight.act_quant_scale = torch.ones(1)


def by_tensor(weight: Any) -> None:
    symmetric = SimpleNamespace(name="SYMMETRIC")
    weight.act_quant_kwargs = SimpleNamespace(granularity="PerTensor", mapping_type=symmetric)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (grouped, "a scale for every"),
        (shifted, "shifted by a zero point"),
        (static, "by scales of its own"),
        (by_tensor, "takes activations by"),
    ],
)
def test_others_are_refused_by_name(spoil: Callable[[Any], None], says: str) -> None:
    model: Any = quantize("stand-in", nn.Linear(6, 3).eval(), float_rows=True)
    spoil(model.weight)
    assert read_integers(model.weight) is None
    with pytest.raises(CaptureError, match=f"'weight' is a Int8Tensor .*{says}"):
        turbotx.optimize(model)(torch.randn(2, 6))
