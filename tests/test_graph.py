"""What the passes ask of a node: shapes say what tracing has assumed, not only what it computed."""

from __future__ import annotations

import torch
from torch import fx

import turbotx
from tests.compiled_functions import compile_function
from tests.kernels.cpp_probe import needs_compiler
from turbotx import graph as g


def add_half(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x.unsqueeze(0) + y.narrow(0, 0, y.shape[0] // 2)


def test_a_size_that_tracing_took_for_one_is_one() -> None:
    """With two elements y // 2 broadcasts; with four it does not."""
    aten = torch.ops.aten

    def half(x: torch.Tensor, y: torch.Tensor) -> fx.Node:
        return compile_function(add_half, x, y).graph.find_nodes(
            op="call_function", target=aten.slice.Tensor
        )[0]

    assert g.shape(half(torch.ones(2), torch.ones(2))) == (1,)
    assert not g.shape(half(torch.ones(2), torch.ones(4)))[0].is_Integer


@needs_compiler
def test_a_size_of_one_broadcasts_whatever_it_is_called() -> None:
    fast = turbotx.optimize(add_half)
    for n, m in ((2, 2), (3, 3), (1, 2), (3, 6), (5, 3)):
        x, y = torch.randn(n), torch.randn(m)
        assert torch.equal(fast(x, y), add_half(x, y))
