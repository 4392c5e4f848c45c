"""Quantize: which products become int8, where rows are quantised, and what the checker rejects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from tests.graphs import calls
from turbotx.capture.trace import capture
from turbotx.engine.pipeline import rewrite
from turbotx.errors import VerifyError
from turbotx.ir.quantized_ops import (
    Scheme,
    quantize_rows,
    quantized_linear,
    row_scale,
    weight_only_linear,
)
from turbotx.passes.quantize import Quantization
from turbotx.passes.quantize_check import check_quantized

X = torch.randn(2, 3, 16)


class Net(nn.Module):
    """Two layers and a head; `forward` is what a test makes of them."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)
        self.other, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)
        self.run = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x)


def mlp(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.norm(net.down(F.gelu(net.up(x))) + x)


def quantized(
    run: Callable[[Any, torch.Tensor], Any], *keep_float: str, model: nn.Module | None = None
) -> fx.GraphModule:
    captured = capture(model or Net(run).eval(), (X,), {})
    made = captured.graph_module
    rewrite(made.graph, "auto", Quantization(made.meta["paths"], keep_float))
    return made


def products(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=quantized_linear))


def test_a_gelu_stays_an_epilogue_and_the_next_product_quantises_its_rows() -> None:
    graph = quantized(mlp).graph
    first, second = products(graph)
    assert first.args[4] is None, "the input is nobody's kernel's result"
    assert second.args[4] is None
    assert calls(graph).count("linear") == 0


def test_behind_a_norm_its_kernel_quantises() -> None:
    (product,) = products(quantized(lambda net, x: net.up(net.norm(x)).exp()).graph)
    rows: Any = product.args[0]
    assert rows.target is quantize_rows
    assert rows.args[0].target is torch.ops.aten.layer_norm.default
    assert product.args[4].target is row_scale


def test_rows_that_two_products_read_are_quantised_once() -> None:
    graph = quantized(lambda net, x: (net.up(x).exp(), net.other(x).exp()), "up").graph
    assert len(products(graph)) == 1
    graph = quantized(lambda net, x: (net.up(x).exp(), F.linear(x, net.other.weight).exp())).graph
    assert len(products(graph)) == 2
    assert len({p.args[0] for p in products(graph)}) == 1


def test_a_part_of_a_norms_rows_is_quantised_by_the_product() -> None:
    run = lambda net, x: (net.norm(x), torch.tanh(net.other(net.norm(x)[:, 0])))  # noqa: E731
    (product,) = products(quantized(run).graph)
    assert product.args[4] is None


def test_projections_are_packed_apart_from_those_that_stay_float() -> None:
    run = lambda net, x: (net.up(x).exp(), net.other(x).exp(), net.head(x).exp())  # noqa: E731
    graph = quantized(run, "head").graph
    (product,) = products(graph)
    assert product.args[1].args[0].target is torch.ops.aten.cat.default
    assert calls(graph).count("linear") == 1
    assert len(products(quantized(run).graph)) == 1, "all three as one"


def test_the_head_stays_float_where_it_is_asked_for() -> None:
    run = lambda net, x: net.head(net.norm(x)).split(2, -1)  # noqa: E731
    assert not products(quantized(run, "@head").graph)
    assert products(quantized(run).graph)


def test_patterns_are_of_modules_names() -> None:
    assert len(products(quantized(mlp, "u*").graph)) == 1
    assert not products(quantized(mlp, "up", "down").graph)


def test_what_is_no_product_by_a_float_weight_stays() -> None:
    run = lambda net, x: (x.double() @ torch.ones(16, 4).double()).exp()  # noqa: E731
    assert not products(quantized(run).graph)
    assert not products(quantized(lambda net, x: (x @ x.transpose(1, 2)).exp()).graph)


def test_weights_alone_leave_rows_as_they_are() -> None:
    made = capture(Net(lambda net, x: net.up(net.norm(x)).exp()).eval(), (X,), {}).graph_module
    rewrite(made.graph, "auto", Quantization(made.meta["paths"], (), Scheme(float_rows=True)))
    (product,) = made.graph.find_nodes(op="call_function", target=weight_only_linear)
    assert product.args[0].target is torch.ops.aten.layer_norm.default
    assert calls(made.graph).count("quantize_rows") == 1, "its weight"
    check_quantized(made.graph)
    with made.graph.inserting_before(product):
        other = made.graph.call_function(torch.ops.aten.mul.Tensor, (product.args[3], 2.0))
        other.meta["val"] = product.args[3].meta["val"]
    product.args = (*product.args[:3], other)
    with pytest.raises(VerifyError, match="scales its columns by mul"):
        check_quantized(made.graph)


def test_again_changes_nothing() -> None:
    made = quantized(mlp)
    before = str(made.graph)
    rewrite(made.graph, "auto", Quantization(made.meta["paths"], ()))
    assert str(made.graph) == before


def two_ways(net: Any, x: torch.Tensor) -> Any:
    """One weight twice, once by rows that a kernel quantises, and two of one shape."""
    y = net.down(F.gelu(net.up(x))).exp()
    return net.up(net.norm(x)).exp(), net.other(y).exp()


def other_scale(graph: fx.Graph) -> None:
    product = next(p for p in products(graph) if p.args[4] is not None)
    other = next(n for n in graph.nodes if n.target is row_scale and n is not product.args[4])
    product.args = (*product.args[:4], other, product.args[5])


def read_as_they_are(graph: fx.Graph) -> None:
    rows = next(p.args[0] for p in products(graph) if p.args[4] is not None)
    (output,) = graph.find_nodes(op="output")
    output.args = ((rows,),)


def foreign_weight_scale(graph: fx.Graph) -> None:
    weights = {p.args[1]: p for p in products(graph)}  # layers that share one share its scale
    *_, one, other = weights.values()
    one.args = (*one.args[:3], other.args[3], *one.args[4:])


def float_weight(graph: fx.Graph) -> None:
    product: Any = products(graph)[0]
    product.args = (product.args[0], product.args[1].args[0], *product.args[2:])


def rows_by_another_scale(graph: fx.Graph) -> None:
    rows: Any = next(p.args[0] for p in products(graph) if p.args[4] is not None)
    other = next(n for n in graph.nodes if n.target is row_scale and n is not rows.args[1])
    rows.args = (rows.args[0], other)


@pytest.mark.parametrize(
    "spoil",
    [other_scale, read_as_they_are, foreign_weight_scale, float_weight, rows_by_another_scale],
)
def test_the_checker_rejects(spoil: Callable[[fx.Graph], None]) -> None:
    graph = quantized(two_ways).graph
    check_quantized(graph)
    spoil(graph)
    with pytest.raises(VerifyError):
        check_quantized(graph)
