"""The class of an optimised model is for that model alone: other objects of it are the user's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import turbotx


@pytest.mark.parametrize("in_place", [False, True])
def test_objects_that_are_made_of_its_class_are_not_the_model(in_place: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    model.requires_grad_(False)
    plain, x = copy.deepcopy(model), torch.randn(2, 4)
    fast: Any = turbotx.optimize(model, in_place=in_place)
    for n in range(2):  # before and after a capture
        torch.testing.assert_close(fast[:2](x), plain[:2](x))
        torch.testing.assert_close((fast + fast)(x), plain(plain(x)))
        assert type(fast)(nn.Linear(4, n + 1))(x).shape == (2, n + 1)
        torch.testing.assert_close(fast(x), plain(x))

    class Below(type(fast)):  # type: ignore[misc]
        pass

    below = Below(nn.Linear(4, 3)).eval()
    assert type(below) is Below and below(x).shape == (2, 3)
    assert fast.stats()["captures"] == 1
