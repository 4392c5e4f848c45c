"""Idle dropout: its result is its argument, also for what is written there afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import turbotx
from turbotx.errors import CaptureError

X = torch.linspace(-1, 1, 24).reshape(2, 3, 2, 2)
MODULES = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@pytest.mark.parametrize(
    "drop",
    [
        lambda y: torch.dropout(y, 0.1, False),
        lambda y: torch.dropout(y, 0.1, train=False),
        lambda y: F.dropout(y, 0.1, training=False),
        lambda y: F.dropout(y, 0.1, False, True),
        lambda y: F.dropout3d(y, training=False),
        lambda y: F.alpha_dropout(y, 0.2),
        lambda y: F.dropout1d(y[0], training=False)[None].expand_as(y),
        *(kind(0.3).eval() for kind in MODULES),
    ],
)
def test_what_is_written_afterwards_shows(drop: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        z = drop(y)
        y += 1
        return y * 10 + z

    torch.testing.assert_close(turbotx.optimize(function)(X), function(X))


def test_a_chance_that_is_none_is_refused_as_eager_does() -> None:
    with pytest.raises(CaptureError, match="probability"):
        turbotx.optimize(lambda x: F.dropout(x, 1.5, training=False) + 1)(X)
