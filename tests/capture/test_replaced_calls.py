"""A tensor of one integer as an index: its place is read at every call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import turbotx
from turbotx.errors import IndexOutOfRangeError

MODELS: list[Any] = [
    lambda x, i: x[:, i] * 2,
    lambda x, i: x[i],
    lambda x, i: x[..., i, :, None] + 1,
    lambda x, i: x[:, i, 1:],
    lambda x, i: x[None, torch.tensor([0, 1]), :, i],
    lambda x, i: x.select(1, i) + x.select(dim=2, index=i)[:, :1],
    lambda x, i: (x[:, i], (x + 1).mul_(2)),
    lambda x, i: x[:, x[0, :, 0].argmax()],
]


@pytest.mark.parametrize("model", MODELS)
def test_the_place_is_this_call_s(model: Any) -> None:
    fast = turbotx.optimize(model)
    for place, shape in ((1, (3, 4, 5)), (2, (3, 4, 5)), (-1, (4, 3, 6)), (0, (4, 3, 6))):
        x, i = torch.randn(*shape), torch.tensor(place)
        torch.testing.assert_close(fast(x, i), model(x, i))


def test_a_place_outside_is_an_error() -> None:
    fast = turbotx.optimize(lambda x, i: x[:, i])
    for place in (4, -5):
        with pytest.raises(IndexOutOfRangeError):
            fast(torch.randn(3, 4), torch.tensor(place))


def test_a_size_in_a_tensor_stays_a_size() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return x[torch.tensor(x.shape[0]) - 1] * 2

    fast = turbotx.optimize(model)
    for n in (3, 5):
        x = torch.randn(n, 2)
        torch.testing.assert_close(fast(x), model(x))
