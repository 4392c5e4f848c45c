"""The fused graph is an ordinary torch.fx.GraphModule: it prints, runs and holds every region.

In: small functions and modules. Out: their fused graphs, run against the originals.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import turbotx
from turbotx.engine.fused_graph import readable


def fuse(target: Callable[..., object], *inputs: torch.Tensor) -> fx.GraphModule:
    return turbotx.explain(turbotx.optimize(target, backend="aten"), *inputs).graph


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(torch.nn.functional.gelu(self.up(x))))


def test_regions_are_submodules_between_gemms() -> None:
    model, x = Mlp().eval(), torch.randn(2, 3, 8)
    graph = fuse(model, x)
    ops = [n.op for n in graph.graph.nodes if n.op.startswith("call")]
    targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_module"]
    assert ops.count("call_module") == 2
    assert targets == ["fused_add_gelu_0", "fused_add_layer_norm_0"]
    inner = graph.get_submodule("fused_add_layer_norm_0")
    assert isinstance(inner, fx.GraphModule) and "layer_norm" in inner.code
    with torch.no_grad():
        torch.testing.assert_close(graph(x)[0], model(x))


def test_it_holds_for_other_sizes_too() -> None:
    model = Mlp().eval()
    graph = fuse(model, torch.randn(2, 3, 8))
    other = torch.randn(5, 11, 8)
    with torch.no_grad():
        torch.testing.assert_close(graph(other)[0], model(other))


def test_parameters_are_the_models_own() -> None:
    model = Mlp().eval()
    graph = fuse(model, torch.randn(2, 3, 8))
    assert graph.get_parameter("up.weight") is model.up.weight


def test_several_outputs_and_a_region_of_several_results() -> None:
    def both(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + y
        return total.exp(), total.sum(-1)

    x, y = torch.randn(3, 4), torch.randn(3, 4)
    graph = fuse(both, x, y)
    for found, expected in zip(graph(x, y), both(x, y), strict=True):
        torch.testing.assert_close(found, expected)


def test_readable_leaves_the_counts_out() -> None:
    text = readable(fuse(Mlp().eval(), torch.randn(2, 3, 8)).graph)
    assert "num_users" not in text and "call_module" in text


def test_the_optimized_module_has_it_after_a_call() -> None:
    fast = turbotx.optimize(Mlp().eval(), backend="aten")
    with pytest.raises(turbotx.TurbotxError, match="call the module once"):
        _ = fast.graph
    x = torch.randn(2, 3, 8)
    expected = fast(x)
    torch.testing.assert_close(fast.graph(x)[0], expected)
