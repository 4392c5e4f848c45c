"""What a model returns beside tensors is what eager returns, at every call."""

from __future__ import annotations

import enum
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import turbotx
from turbotx.errors import CaptureError


class Kind(enum.Enum):
    WIDE = "wide"


class Pair(NamedTuple):
    first: Any
    second: Any


def same(a: Any, b: Any) -> bool:
    """Equal in value and in type, whatever is nested in what."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):  # NaN is NaN, and -0.0 is not 0.0
        return type(a) is type(b) and a.hex() == b.hex()
    return type(a) is type(b) and bool(a == b)


@pytest.mark.parametrize(
    "model",
    [
        lambda x: (x * 2, x.shape),
        lambda x: Pair(x.exp().size(), [x.shape[1:], (x + 1).transpose(0, 1).shape]),
        lambda x: (x + 1, x.shape[0] > 2, x.shape[0] == x.shape[1], x.shape[1] != 3),
        lambda x: (x + 1, x.dtype, x.device, x.layout, torch.channels_last),
        lambda x: (x + 1, {1, "two"}, frozenset((3,)), range(4), slice(1, None), ...),
        lambda x: (x + 1, Kind.WIDE, 2j, b"bytes", torch.finfo(x.dtype), Pair),
        lambda x: (x + 1, x.shape[0] / 2, x.shape[1] * 0.5, None, True, "text"),
    ],
)
def test_outputs_are_eager_s(model: Any) -> None:
    fast = turbotx.optimize(model)
    for shape in ((2, 3), (4, 4), (3, 2)):
        x = torch.randn(*shape)
        assert same(fast(x), model(x))


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("first", [1.5, NAN, -0.0])
@pytest.mark.parametrize(
    "model",
    [
        lambda x, f: (x + 1, f, [f * 2, -f, (abs(f), f + 1)]),
        lambda x, f: f,
        lambda x, f: (x * f).isnan().any(),
        lambda x, f: (x, NAN, INF, [-INF, NAN], np.float64("nan")),
        lambda x, f: (x, x.shape[0] * INF, -INF * x.shape[1], x.shape[0] / 2 - INF),
    ],
)
def test_floats_that_are_no_numbers(model: Any, first: float) -> None:
    fast = turbotx.optimize(model)
    for shape, number in (((2, 3), first), ((1, 3), NAN), ((0, 3), INF), ((4, 1), 0.0)):
        x = torch.randn(*shape)
        assert same(fast(x, number), model(x, number))


def test_a_set_is_the_caller_s() -> None:
    fast = turbotx.optimize(lambda x: (x + 1, {1, 2}))
    fast(torch.ones(2))[1].add(3)
    assert fast(torch.ones(2))[1] == {1, 2}


class Holder:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda x: (x, {x * 2}), "a set"),
        (lambda x: Holder(x + 1), "Holder"),
        (lambda x: (x, lambda: x), "function"),
    ],
)
def test_what_may_hold_tensors_is_refused_by_name(model: Any, named: str) -> None:
    with pytest.raises(CaptureError, match=f"its output holds a .*{named.split()[-1]}"):
        turbotx.optimize(model)(torch.ones(2, 2))


def test_sizes_and_relations_survive_saving(tmp_path: Any) -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x * 2, x.shape, x.shape[0] == x.shape[1], x.dtype, round(x.shape[1] * 0.4)

    net = Net().eval()
    fast = turbotx.optimize(net)
    fast(torch.ones(2, 5))
    turbotx.save(fast, tmp_path / "net.ttx")
    loaded = turbotx.load(tmp_path / "net.ttx")
    for shape in ((2, 5), (4, 4)):
        x = torch.randn(*shape)
        assert same(loaded(x), net(x))
