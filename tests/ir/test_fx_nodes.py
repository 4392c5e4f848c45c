"""What the passes ask of a node: shapes say what tracing has assumed, numbers come from sizes."""

from __future__ import annotations

import torch
from torch import fx

import turbotx
from tests.compiled_functions import compile_function
from tests.kernels.cpp.cpp_probe import needs_compiler
from turbotx.ir import fx_nodes as g


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


def test_names_of_targets_hold_no_addresses() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    op = graph.call_function(torch.ops.aten.neg.default, (x,))
    assert g.target_name(op) == "aten.neg.default"
    function = graph.call_function(add_half, (x, x))
    assert g.target_name(function) == f"{__name__}.add_half"


@needs_compiler
def test_a_size_of_one_broadcasts_whatever_it_is_called() -> None:
    fast = turbotx.optimize(add_half)
    for n, m in ((2, 2), (3, 3), (1, 2), (3, 6), (5, 3)):
        x, y = torch.randn(n), torch.randn(m)
        assert torch.equal(fast(x, y), add_half(x, y))


@needs_compiler
def test_numbers_computed_from_sizes() -> None:
    def function(x: torch.Tensor) -> list[torch.Tensor]:
        n = x.shape[1]
        down = torch.arange(n, 0, -1.0)
        return [x.sum(1) * (1 / n), x * n**-0.5 + down, torch.where(x > 0, x, x.shape[0])]

    fast = turbotx.optimize(function)
    for shape in ((3, 5), (1, 1), (4, 2)):
        x = torch.randn(shape)
        for ours, eager in zip(fast(x), function(x), strict=True):
            torch.testing.assert_close(ours, eager)
