"""Extraction: a part of a graph runs on its own and means the same."""

from __future__ import annotations

import torch

from tests.graphs import captured_graph, node
from turbotx.passes.canonicalize import canonicalize
from turbotx.passes.extract import extract


def test_a_part_runs_alone() -> None:
    graph = captured_graph(lambda x: (x.exp().reshape(-1) + 1).sin(), torch.randn(2, 3))
    canonicalize(graph)
    exp, sin = node(graph, "exp"), node(graph, "sin")
    part = extract([sin], [exp], "part")
    given = torch.randn(4, 5)
    sizes = [20] * len(part.sizes)
    torch.testing.assert_close(part.module(given, *sizes)[0], (given.reshape(-1) + 1).sin())


def test_inputs_may_be_outputs_of_the_part_too() -> None:
    graph = captured_graph(lambda x: x.exp().sin(), torch.randn(3))
    x, exp, sin = node(graph, "x"), node(graph, "exp"), node(graph, "sin")
    part = extract([exp, sin], [x], "part")
    given = torch.randn(3)
    first, second = part.module(given)
    torch.testing.assert_close(first, given.exp())
    torch.testing.assert_close(second, given.exp().sin())


def test_the_shape_of_a_tensor_that_is_not_given() -> None:
    graph = captured_graph(lambda x, y: torch.full_like(x.exp(), 3) + y, X := torch.ones(2, 5), X)
    part = extract([node(graph, "add")], [node(graph, "y")], "part")
    assert len(part.sizes) == 2
    torch.testing.assert_close(part.module(torch.ones(4, 3), 4, 3)[0], torch.full((4, 3), 4.0))


def test_a_tensor_that_is_given_says_its_shape_itself() -> None:
    graph = captured_graph(lambda x: torch.zeros_like(x.view(-1)) + x.view(-1), torch.ones(2, 5))
    part = extract([node(graph, "add")], [node(graph, "x")], "part")
    assert all(n.target is not torch.ops.aten.full.default for n in part.module.graph.nodes)
