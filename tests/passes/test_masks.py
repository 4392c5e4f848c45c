"""Masks over places where queries stand at the last keys, as behind a cache.

In: attention written with masks over symbolic places. Out: a diagonal and a window of the kernel's,
a boolean bias only where terms disagree.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import turbotx
from tests.passes.test_attention import Attend, positions, recognized

PAST = torch.randn(2, 4, 3, 8)
LATE = {
    "causal": (lambda q, k: k <= q, True, None),
    "the last 3": (lambda q, k: (k <= q) & (k > q - 3), True, (2, -1)),
    "near": (lambda q, k: (q - k).abs() <= 1, False, (1, 1)),
}


def some_rows(said: str):
    """Attention behind earlier keys, as behind a cache, by a mask over places."""

    def function(q, k, v, past):
        k, v = torch.cat([past, k], 2), torch.cat([past, v], 2)
        rows = positions(q.shape[2])[:, None] + (k.shape[2] - q.shape[2])
        mask = LATE[said][0](rows, positions(k.shape[2])[None, :])
        return F.scaled_dot_product_attention(q, k, v, mask)

    return function


@pytest.mark.parametrize("said", LATE)
def test_queries_may_stand_at_the_last_keys(said: str) -> None:
    (node,) = recognized(some_rows(said), PAST)
    _, causal, window = LATE[said]
    assert node.kwargs["late"] is True and node.args[3:] == (None, None)
    assert node.kwargs["causal"] is causal and node.kwargs.get("window") == window


def test_places_that_disagree_stay_a_mask() -> None:
    def function(q, k, v, past):
        k, v = torch.cat([past, k], 2), torch.cat([past, v], 2)
        rows, columns = positions(q.shape[2])[:, None], positions(k.shape[2])[None, :]
        late = rows + (k.shape[2] - q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, (columns <= late) & (columns > rows - 2))

    (node,) = recognized(function, PAST)
    assert node.kwargs["late"] is True and node.kwargs["causal"] is True
    assert node.args[4] is not None


@torch.no_grad()
@pytest.mark.parametrize("way", ["flash", "fused-softmax"])
@pytest.mark.parametrize("said", LATE)
def test_late_queries_through_kernels(said: str, way: str) -> None:
    module = Attend(some_rows(said)).eval()
    fast = turbotx.optimize(module, attention=way)
    for length, before in ((5, 3), (1, 9), (4, 1)):
        x, past = torch.randn(2, length, 16), torch.randn(2, 4, before, 8)
        torch.testing.assert_close(fast(x, past), module(x, past), rtol=2e-5, atol=2e-6)
