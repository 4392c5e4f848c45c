"""Gathers at known places inside a part of cat, pad or slice_scatter: what must fit is that part.

In: functions whose index is computed from the place. Out: the same as eager's, and an error only
where eager has one.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import turbotx
from tests.kernels.cpp.cpp_probe import needs_compiler
from turbotx.errors import IndexOutOfRangeError


def first_and_last(x):
    rows = torch.arange(x.shape[0])
    return torch.cat([x[rows, 0], x[rows, -1], x.sum(1)], 0)


def every_second(x):
    return torch.cat([x.amax(1), x[2 * torch.arange(x.shape[0] // 2), 1]], 0)


def backwards(x):
    return torch.cat([x, x[:, x.shape[1] - 1 - torch.arange(x.shape[1])]], 1)


def padded(x):
    return F.pad(x[torch.arange(x.shape[0]), 1], (1, 2, 3, 1), value=0.5)


def scattered(x):
    base = x.repeat(1, 2, 1)
    return torch.slice_scatter(base, x[:, torch.arange(x.shape[1])], 1, x.shape[1])


def halves_of_a_norm(x):
    h = F.layer_norm(x[:, :, torch.arange(8)], (8,))
    return torch.cat([h[..., 4:], -h[..., :4]], -1)


def nested(x):
    rows = torch.arange(x.shape[0])
    inner = torch.cat([x[rows, 0], x[rows, 1]], 0)
    return torch.cat([x[:, 0], inner], 0)


@needs_compiler
@pytest.mark.parametrize(
    "function",
    [first_and_last, every_second, backwards, padded, scattered, halves_of_a_norm, nested],
    ids=lambda f: f.__name__,
)
def test_a_gather_inside_a_part(function) -> None:
    fast = turbotx.optimize(function)
    for shape in ((4, 3, 8), (6, 5, 8), (2, 2, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(fast(x), function(x))


@needs_compiler
def test_what_does_not_fit_is_an_error_as_it_is_eager() -> None:
    def function(x, y):
        return torch.cat([y, x[torch.arange(4)]], 0)

    fast, y = turbotx.optimize(function), torch.randn(7, 3)
    for rows in (5, 4):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(fast(x, y), function(x, y))
    with pytest.raises(IndexOutOfRangeError):
        fast(torch.randn(3, 3), y)
