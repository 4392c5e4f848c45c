"""In-place reuse: found where it is safe, refused where a later read would see the new value."""

from __future__ import annotations

import torch

import turbotx
from tests.graphs import captured_graph
from turbotx.kernels.fuse import fuse
from turbotx.kernels.inplace import find_inplace
from turbotx.passes.canonicalize import canonicalize
from turbotx.passes.partition import find_prepared, partition

X, B = torch.randn(3, 4, 8), torch.randn(8)


def pairs(function, *args):
    graph = captured_graph(function, *args)
    canonicalize(graph)
    (region,) = partition(graph, find_prepared(graph))
    return find_inplace(fuse(region).kernels[0].kernel)


def test_elementwise_kernels_write_over_what_they_read() -> None:
    assert pairs(lambda x, b: (x + b).tanh(), X, B) == (("tanh", "x"),)


def test_a_broadcast_input_is_kept() -> None:
    found = pairs(lambda x, b: x + b, X, B)
    assert all(given != "b" for _, given in found)


def test_row_reductions_write_over_their_row() -> None:
    assert [given for _, given in pairs(lambda x: x.softmax(-1), X)] == ["x"]


def test_a_transposed_read_is_refused() -> None:
    assert pairs(lambda x: x.transpose(0, 1) + 1, X.new_zeros(4, 4, 8)) == ()


def test_a_conversion_is_refused() -> None:
    assert pairs(lambda x: x.to(torch.float64) + 1, X) == ()


def test_a_flipped_read_is_refused() -> None:
    assert pairs(lambda x: torch.cat([x[:, 2:], x[:, :2]], 1) * 2, X) == ()


def test_an_early_store_is_refused() -> None:
    def function(x):
        y = x.exp()
        return y, y - y.mean(-1, keepdim=True)

    assert pairs(function, X) == ()


def test_a_chain_of_reuse_computes_the_same() -> None:
    def function(x, w):
        for _ in range(4):
            x = ((x @ w).tanh() * 2 + 1).softmax(-1)
        return x

    w = torch.randn(8, 8)
    torch.testing.assert_close(turbotx.optimize(function)(X, w), function(X, w))
