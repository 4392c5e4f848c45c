"""Expanded inputs decide no order of dims, and cost a capture only where that shows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import turbotx
from turbotx.capture.callables import FunctionModule
from turbotx.capture.trace import capture


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


FUNCTIONS = {
    "sum": lambda x, y: x + y,
    "turned inside": lambda x, y: x + y.t().contiguous().t(),
    "twice": lambda x, y: (x * 2 - y).exp() * x,
    "of a view": lambda x, y: torch.where(x[1:] > 0, x[1:], y[1:]),
    "the order of the other": lambda x, y: torch.maximum(y.t(), x.t()),
    "reduced": lambda x, y: (x[:, :, None] * y.t()[None]).sum(0),
}
CALLS = (
    (randn(4, 1).expand(4, 5), randn(5, 4).t()),
    (randn(3, 1).expand(3, 7), randn(7, 3).t()),
    (randn(5).expand(4, 5), randn(5, 4).t()),
    (randn(1, 1).expand(4, 5), randn(4, 5)),
    (randn(4, 5), randn(5, 4).t()),
    (randn(5, 1).expand(5, 4).t(), randn(4, 5)),
    (randn(4, 1).expand(4, 5), randn(4, 5)),
)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_lie_as_eagers(name: str) -> None:
    function = FUNCTIONS[name]
    fast = turbotx.optimize(function, backend="aten")
    for x, y in (*CALLS, CALLS[0]):
        came, right = fast(x, y), function(x, y)
        torch.testing.assert_close(came, right)
        assert came.stride() == right.stride(), (x.stride(), y.stride())


def test_compiled_kernels_read_one_element_of_such_a_dim() -> None:
    fast = turbotx.optimize(FUNCTIONS["sum"])
    x, y = CALLS[0]
    assert fast(x, y).stride() == (x + y).stride() == (1, 4)
    torch.testing.assert_close(fast(x, y), x + y)
    assert fast.stats()["captures"] == 1


def test_where_it_does_not_show_one_capture_serves_both() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            scores = (x @ x.mT + mask).softmax(-1)
            return self.linear((scores @ x).transpose(0, 1).contiguous())

    model = Masked().eval()
    fast = turbotx.optimize(model, backend="aten")
    for mask in (randn(2, 5, 5), randn(1, 1, 5).expand(2, 5, 5), randn(2, 1, 5).expand(2, 5, 5)):
        x = randn(2, 5, 8)
        torch.testing.assert_close(fast(x, mask), model(x, mask))
    assert fast.stats()["captures"] == 1


def test_what_it_was_traced_for_is_told() -> None:
    x, y = CALLS[0]
    made = capture(FunctionModule(FUNCTIONS["sum"]), (x, y), {}).expanded
    assert made.dims == {0: (1,), 1: ()} and made.decisive == {0, 1}
    assert made.serve([x, y]) and not made.serve([x.contiguous(), y])
