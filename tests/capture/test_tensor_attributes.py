"""Attributes that a user has set on tensors: no program sees them, so code that reads one is
refused by name, and where none is set, that is a guard."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import turbotx
from turbotx.errors import CaptureError


class Scaled(nn.Module):
    """Asks its weight and its buffer for a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("offset", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale: Any = getattr(self.weight, "scale", 1.0)
        more = self.offset.more if hasattr(self.offset, "more") else 0
        return x * self.weight * scale + more


@pytest.mark.parametrize(("tensor", "name"), [("weight", "scale"), ("offset", "more")])
def test_an_attribute_of_the_models_tensors_is_refused_by_name(tensor: str, name: str) -> None:
    model, x = Scaled().eval(), torch.randn(2, 3)
    fast = turbotx.optimize(model, backend="aten")
    torch.testing.assert_close(fast(x), model(x))
    model.get_parameter("weight").unread = 7
    torch.testing.assert_close(fast(x[:1]), model(x[:1]))
    assert fast.stats()["captures"] == 1
    held: Any = getattr(model, tensor)
    setattr(held, name, 5.0)
    with pytest.raises(CaptureError, match=f"reads '{name}' of the tensor '{tensor}'"):
        fast(x)
    delattr(held, name)
    torch.testing.assert_close(fast(x), model(x))
    assert fast.stats()["captures"] == 1


@pytest.mark.parametrize("first", [True, False])
def test_an_attribute_of_an_argument_is_refused_by_name(first: bool) -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * 2 if hasattr(y, "mark") else x + y

    fast, plain, marked = turbotx.optimize(model, backend="aten"), torch.ones(3), torch.ones(3)
    marked.mark = "yes"  # type: ignore[attr-defined]
    for y in (marked, plain, marked, plain) if first else (plain, marked, plain, marked):
        if y is marked:
            with pytest.raises(CaptureError, match="reads 'mark' of the tensor 'y'"):
                fast(plain, y)
        else:
            assert torch.equal(fast(plain, y), model(plain, y))


def test_what_forward_itself_sets_is_seen() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        y: Any = x * 2
        y.scale = 3.0
        return y * y.scale

    x = torch.randn(4)
    torch.testing.assert_close(turbotx.optimize(model, backend="aten")(x), model(x))


GLOBAL = torch.ones(3)


def set_on_an_argument(x: Any) -> Any:
    x.seen = True
    return x * 2


def set_on_a_result(x: Any) -> Any:
    y: Any = x * 2
    y.seen = x.shape[0]
    return [y]


def set_on_a_global(x: Any) -> Any:
    GLOBAL.seen = x  # type: ignore[attr-defined]
    return x * GLOBAL


class Marking(nn.Module):
    """Sets an attribute of its weight, or of a tensor that it keeps."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.linear, self.keeps, self.kept = nn.Linear(3, 3), keeps, torch.ones(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: Any = self.linear(x)
        if self.keeps:
            y.seen, self.kept = True, y
        else:
            self.linear.weight.seen = True  # type: ignore[assignment]
        return y * 2


@pytest.mark.parametrize(
    "model", [set_on_an_argument, set_on_a_result, set_on_a_global, Marking(True), Marking(False)],
    ids=lambda x: getattr(x, "__name__", f"{x}"[:7]),
)  # fmt: skip
def test_an_attribute_that_would_be_lost_is_refused_by_name(model: Any) -> None:
    model = model.eval() if isinstance(model, nn.Module) else model
    fast, x = turbotx.optimize(model, backend="aten"), torch.ones(3)
    for _ in range(2):
        with pytest.raises(CaptureError, match="sets 'seen' of a tensor"):
            fast(x)
    assert not hasattr(GLOBAL, "seen") and not hasattr(x, "seen")
