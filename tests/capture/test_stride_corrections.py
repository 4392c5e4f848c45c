"""Results lie as eager lays them out, also where PyTorch's tracer would lay them otherwise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import turbotx

INDEX = torch.tensor([[0, 1], [1, 0], [0, 0]]).t()
NORMS = {n: nn.BatchNorm1d(n).eval() for n in (5, 6)}
NORM = nn.BatchNorm2d(5).eval()
CASES = {
    "index": lambda x: x[INDEX] * 1.5,
    "index in the middle": lambda x: x.transpose(1, 2)[:, INDEX],
    "indices apart": lambda x: x[INDEX, :, torch.tensor([[0, 1, 3]])],
    "indices across": lambda x: x[torch.tensor([0, 1]), torch.tensor([0, 1])[:, None]],
    "batch norm": lambda x: NORMS[6](x.transpose(1, 2)).transpose(1, 2),
    "batch norm of a matrix": lambda x: NORMS[5](x[0].t()),
    "batch norm, channels last": lambda x: NORM(x.unflatten(1, (5, -1)).permute(0, 1, 3, 2)),
    "max pool": lambda x: F.max_pool1d(x.transpose(1, 2), 2),
    "floor": lambda x: x.transpose(1, 2) // 2,
    "floor, rounding": lambda x: torch.div(x.transpose(1, 2), 2, rounding_mode="floor"),
    "and": lambda x: (x.permute(2, 0, 1) > 0).logical_and(x.permute(2, 0, 1)[:, :1] > 0),
    "or": lambda x: torch.logical_or(x[:, :1].permute(2, 0, 1), x.permute(2, 0, 1)),
    "logaddexp": lambda x: torch.logaddexp(x.permute(2, 0, 1), x.permute(2, 0, 1)[:, :1]),
    "copysign": lambda x: torch.copysign(x.permute(2, 0, 1), torch.tensor(-1.0)),
    "power of two": lambda x: 2 ** x.permute(2, 0, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_results_have_eagers_strides(name: str) -> None:
    fast = turbotx.optimize(CASES[name], backend="aten")
    with torch.no_grad():
        for x in (torch.randn(2, 5, 6), torch.randn(3, 5, 6)):
            right, came = CASES[name](x), fast(x)
            torch.testing.assert_close(came, right)
            assert came.stride() == right.stride()


def test_the_angle_of_complex_numbers_is_dense() -> None:
    for x in (torch.randn(4, 3, dtype=torch.complex64).t(), torch.randn(4, 3).t()):
        came = turbotx.optimize(lambda x: x.angle())(x)
        torch.testing.assert_close(came, x.angle())
        assert came.stride() == x.angle().stride()


VIEWS = {
    "expand_as itself": lambda x: x.expand_as(x),
    "broadcast with itself": lambda x: torch.broadcast_tensors(x, x)[1],
    "as itself, transposed": lambda x: x.t().reshape_as(x.t()),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_by_the_input_itself_are_views(name: str) -> None:
    fast = turbotx.optimize(VIEWS[name])
    for x in (torch.randn(3, 4), torch.randn(2, 5)):
        came, right = fast(x), VIEWS[name](x)
        assert torch.equal(came, right) and came.stride() == right.stride()
        assert came.data_ptr() == x.data_ptr()


def test_they_cost_no_copy() -> None:
    norm = NORMS[6]
    x = torch.randn(2, 5, 6)
    report = turbotx.explain(lambda x: norm(x.transpose(1, 2)).transpose(1, 2) * 2, x)
    assert len(report.launches) == 1 and len(report.kernels) == 1
