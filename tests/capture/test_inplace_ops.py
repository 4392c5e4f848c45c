"""In-place ops: those that only the graph sees are written as ops that make a new tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

import turbotx
from tests.graphs import captured
from turbotx.capture.inplace_ops import write_out_of_place


def adds(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y += x.shape[1]
    return y.relu_() + y


def fills(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x).masked_fill_(x > 0, 3.0) + x


def puts(x: torch.Tensor) -> torch.Tensor:
    places = torch.arange(x.shape[1])
    turned = torch.empty_like(places)
    turned[places.flip(0)] = places
    return x * turned[None, :, None]


def scores(x: torch.Tensor) -> torch.Tensor:
    y = torch.einsum("bid,bjd->bij", x, x)
    y += x.shape[0]
    return y.softmax(-1)


def looked_at_before(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    first = y[:, :1]
    y += 1
    return y + first


def a_part(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, 0] += 1
    return y


def widens(x: torch.Tensor) -> torch.Tensor:
    y = x.bfloat16()
    y += x
    return y.float()


def of_one_operand(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    z = torch.einsum("bij->bji", y)
    z += 1
    return y.sum(2) + z.sum(1)


class Calls(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def changes(function: Callable[[torch.Tensor], torch.Tensor]) -> tuple[int, int]:
    """How many calls of a function's graph change a tensor, before and after."""
    sizes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    example = (torch.randn(2, 4, 4),)
    program = torch.export.export(Calls(function), example, dynamic_shapes=sizes, strict=False)

    def count() -> int:
        calls: list[Any] = [n.target for n in program.graph.nodes if n.op == "call_function"]
        return sum(getattr(t, "_schema", None) is not None and t._schema.is_mutable for t in calls)

    before = count()
    write_out_of_place(program.graph)
    program.graph.lint()
    return before, count()


@pytest.mark.parametrize("function", [adds, fills, puts, scores])
def test_a_tensor_of_the_graphs_own(function, monkeypatch) -> None:
    before, after = changes(function)
    assert before and not after

    def trace_again(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a second trace of the whole")

    monkeypatch.setattr(ExportedProgram, "run_decompositions", trace_again)
    fast = turbotx.optimize(function, backend="aten")
    for shape in ((2, 4, 4), (1, 1, 4), (3, 7, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(fast(x), function(x))


@pytest.mark.parametrize("function", [looked_at_before, a_part, widens, of_one_operand])
def test_what_something_else_sees_stays(function) -> None:
    before, after = changes(function)
    assert before == after
    fast, x = turbotx.optimize(function, backend="aten"), torch.randn(2, 4, 4)
    torch.testing.assert_close(fast(x), function(x))


def test_what_may_be_its_argument_counts_as_a_view() -> None:
    def dropped(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        z = torch.dropout(y, 0.1, False)  # y itself
        y += 1
        return y + z

    before, after = changes(dropped)
    assert before == after == 1


def test_an_input_stays() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.add_.Tensor, (x, 1)))
    write_out_of_place(graph)
    assert torch.ops.aten.add_.Tensor in {n.target for n in graph.nodes}


def test_a_pool_that_drops_the_dim_it_added_is_taken_apart_node_by_node(monkeypatch) -> None:
    def pool(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool1d(x.transpose(1, 2), 1)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", None)
    graph = captured(pool, torch.randn(2, 5, 4)).graph_module.graph
    values = [n.meta["val"] for n in graph.nodes if n.op == "call_function"]
    shapes = [tuple(v.shape[1:]) for v in values if isinstance(v, torch.Tensor)]
    assert shapes[-1] == (4, 1) and (4, 1, 1) in shapes
