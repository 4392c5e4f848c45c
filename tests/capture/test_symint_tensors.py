"""Size tensors: a size that the model keeps in a tensor stays a size."""

from __future__ import annotations

import torch

import turbotx

TABLE = torch.randn(40, 4)


def near(x: torch.Tensor) -> torch.Tensor:
    """As a relative position table is cut to what a sequence can reach."""
    span = torch.tensor(min(x.shape[1], 16))
    places = torch.clamp(torch.arange(x.shape[1]) + 3 - span, 0, span * 2 - 1)
    return x + TABLE[16 - span : 16 + span].sum(0) + TABLE[places]


def in_halves(x: torch.Tensor) -> torch.Tensor:
    rows = torch.div(x.shape[1] * 4, 2, rounding_mode="trunc")
    return x.reshape(x.shape[0], rows, 2).softmax(1)


def test_sizes_in_tensors_hold_for_any_length() -> None:
    for function in (near, in_halves):
        fast = turbotx.optimize(function)
        for length in (5, 1, 12):
            x = torch.randn(2, length, 4)
            torch.testing.assert_close(fast(x), function(x))
        # PyTorch 2.11 reads a size that is kept in a tensor: a length of 1 is another capture.
        assert fast.stats()["captures"] <= (3 if torch.__version__ < (2, 12) else 1)
