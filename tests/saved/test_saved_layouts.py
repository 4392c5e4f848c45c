"""Saved models: weights, inputs and outputs lie as they did in the model that was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import turbotx
from turbotx.errors import ModelChangedError, SaveError

pytest.importorskip("safetensors")


class Model(nn.Module):
    """Its weight lies by columns, its table repeats a row, its outputs alias inputs and state."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6).t(), requires_grad=False)
        self.register_buffer("table", torch.randn(1, 5).expand(4, 5))
        self.register_buffer("hidden", torch.randn(5, 5).t(), persistent=False)
        self.linear = nn.Linear(5, 3)

    def forward(self, x):
        y = x @ self.weight + self.table @ self.hidden
        return self.linear(y), y.transpose(0, 1), x[1:], self.table, self.weight.t().exp()


def assert_same(mine, own) -> None:
    for a, b in zip(mine, own, strict=True):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()


def test_layouts_come_back(tmp_path: Path) -> None:
    model = Model().eval()
    fast, x = turbotx.optimize(model), torch.randn(4, 6)
    turned = torch.randn(6, 4).t()
    fast(x), fast(turned)
    turbotx.save(fast, tmp_path / "m.ttx")
    loaded = turbotx.load(tmp_path / "m.ttx")
    assert loaded.weight.stride() == model.weight.stride()
    for call in (x, turned):
        found = loaded(call)
        assert_same(found, model(call))
        assert found[2].data_ptr() == call[1:].data_ptr()
        found[4].zero_()
        assert_same(loaded(call), model(call))


def test_weights_of_another_layout_are_refused(tmp_path: Path) -> None:
    model = Model().eval()
    fast, x = turbotx.optimize(model), torch.randn(4, 6)
    fast(x)
    turbotx.save(fast, tmp_path / "m.ttx")
    loaded = turbotx.load(tmp_path / "m.ttx")
    loaded.weight.data = loaded.weight.data.contiguous()
    with pytest.raises(ModelChangedError, match=r"'weight'.*strides are"):
        loaded(x)


def test_what_served_another_dtype_is_not_saved(tmp_path: Path) -> None:
    model = nn.Linear(4, 4).eval()
    fast, x = turbotx.optimize(model), torch.randn(3, 4)
    fast(x)
    model.double()
    fast(x.double())
    turbotx.save(fast, tmp_path / "m.ttx")
    loaded = turbotx.load(tmp_path / "m.ttx")
    torch.testing.assert_close(loaded(x.double()), model(x.double()))
    assert loaded.stats()["programs"] == 1


def test_a_capture_of_an_expanded_tensor_is_not_saved(tmp_path: Path) -> None:
    fast = turbotx.optimize(lambda x, y: x + y, backend="aten")
    fast(torch.randn(3, 1).expand(3, 4), torch.randn(4, 3).t())
    with pytest.raises(SaveError, match=r"expanded tensor 'x'.*x\.contiguous\(\)"):
        turbotx.save(fast, tmp_path / "model.ttx")
