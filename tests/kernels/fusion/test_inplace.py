"""In-place reuse: found where it is safe, refused where a later read would see the new value."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import turbotx
from tests.compiled_functions import compile_function
from turbotx.kernels.fusion.inplace import find_inplace

X, B = torch.randn(3, 4, 8), torch.randn(8)


def pairs(function, *args):
    (kernel,) = compile_function(function, *args).kernels
    return find_inplace(kernel)


def test_elementwise_kernels_write_over_what_they_read() -> None:
    assert pairs(lambda x, b: (x + b).tanh(), X, B) == (("tanh", "x"),)


def test_a_broadcast_input_is_kept() -> None:
    found = pairs(lambda x, b: x + b, X, B)
    assert all(given != "b" for _, given in found)


def test_row_reductions_write_over_their_row() -> None:
    assert [given for _, given in pairs(lambda x: x.softmax(-1), X)] == ["x"]


def test_a_transposed_read_is_refused() -> None:
    assert pairs(lambda x: (x.transpose(0, 1) + 1).contiguous(), X.new_zeros(4, 4, 8)) == ()


def test_a_conversion_is_refused() -> None:
    assert pairs(lambda x: x.to(torch.float64) + 1, X) == ()


def test_a_flipped_read_is_refused() -> None:
    assert pairs(lambda x: torch.cat([x[:, 2:], x[:, :2]], 1) * 2, X) == ()


def test_an_early_store_is_refused_and_the_last_one_taken() -> None:
    def function(x):
        y = x.exp()
        return y, y - y.mean(-1, keepdim=True)

    assert pairs(function, X) == (("sub", "x"),)


def test_a_load_behind_the_store_is_refused() -> None:
    def function(x, y):
        halves = torch.cat([x[..., :4], x[..., 4:]], -1).tanh()
        return halves, halves + y

    assert ("tanh", "y") not in pairs(function, X, X.clone())


def test_a_store_between_the_loops_of_one_reduction_is_refused() -> None:
    """C++ finds a softmax's largest value in one loop and its sum in the next."""

    def function(x):
        return x - x.amax(-1, keepdim=True), x.log_softmax(-1)

    assert pairs(function, X) == (("log_softmax", "x"),)


@pytest.mark.parametrize("width", [8, 24])
def test_what_a_later_load_needs_stays(width: int) -> None:
    """Rolled halves, and rows of two loops, between products that have intermediates to reuse."""
    w = torch.randn(width, width)

    def rolled(x):
        h = F.rms_norm(x, (width,))
        a = torch.cat([(h @ w)[:, 2:], (h @ w)[:, :2]], 1)
        return (h - a) @ w, h * a

    def scaled(x):
        h = x @ w
        below = h - h.amax(-1, keepdim=True)
        return below @ w, h.log_softmax(-1), h * h.var(-1, keepdim=True), below.roll(1, 0)

    x = torch.randn(2, 5, width)
    for function in (rolled, scaled):
        torch.testing.assert_close(turbotx.optimize(function)(x), function(x), rtol=1e-4, atol=1e-4)


def test_a_chain_of_reuse_computes_the_same() -> None:
    def function(x, w):
        for _ in range(4):
            x = ((x @ w).tanh() * 2 + 1).softmax(-1)
        return x

    w = torch.randn(8, 8)
    torch.testing.assert_close(turbotx.optimize(function)(X, w), function(X, w))
