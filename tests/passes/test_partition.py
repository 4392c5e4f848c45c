"""Partition: maximal, convex regions between GEMMs; what a region needs and gives."""

from __future__ import annotations

import torch
from torch import nn

import turbotx
from tests.graphs import captured_graph
from turbotx.capture.trace import capture
from turbotx.ir.verifier import check_region
from turbotx.passes.canonicalize import canonicalize
from turbotx.passes.partition import MOST_DEEP, find_hoisted, kind_of, op_name, partition

W = torch.randn(8, 8)
X = torch.randn(3, 8)


def regions(function, *args):
    graph = captured_graph(function, *args)
    canonicalize(graph)
    found = partition(graph, find_hoisted(graph))
    for region in found:
        check_region(region.nodes, region.outputs)
    return [[op_name(n) for n in r.nodes] for r in found]


def test_runs_between_gemms() -> None:
    def function(x, w):
        y = (x.exp() + 1) @ w
        return (y.tanh() * 2) @ w

    assert regions(function, X, W) == [["exp", "add"], ["tanh", "mul"]]


def test_a_residual_that_skips_a_gemm_keeps_regions_apart() -> None:
    def function(x, w):
        y = x.exp()
        return (y @ w) + y

    assert regions(function, X, W) == [["exp"], ["add"]]


def test_independent_runs_are_independent_regions() -> None:
    found = regions(lambda x, w: ((x.exp() @ w).sin(), (x.cos() @ w).tanh()), X, W)
    assert sorted(found) == [["cos"], ["exp"], ["sin"], ["tanh"]]


def test_a_value_with_one_late_reader_moves_to_it() -> None:
    found = regions(lambda x, w: ((x @ w) @ w) + x.exp(), X, W)
    assert found == [["exp", "add"]]


def test_a_reduction_with_one_late_reader_stays() -> None:
    found = regions(lambda x, w: ((x @ w) @ w) + x.sum(-1, keepdim=True), X, W)
    assert found == [["sum"], ["add"]]


def test_two_readers_keep_a_value_stored() -> None:
    found = regions(lambda x, w: ((x.exp() @ w).sin() + x.exp(), (x.exp() @ w @ w).sin()), X, W)
    assert ["exp"] in found


def test_the_size_of_a_value_is_no_reader_of_it() -> None:
    """Tracing may ask a value for its size where no input has that size."""
    aten = torch.ops.aten
    graph = captured_graph(lambda x, k: x.exp()[k % 3].tanh(), X, torch.arange(4))
    (exp,) = graph.find_nodes(op="call_function", target=aten.exp.default)
    (remainder,) = graph.find_nodes(op="call_function", target=aten.remainder.Scalar)
    with graph.inserting_after(exp):
        size = graph.call_function(aten.sym_size.int, (exp, 0))
    size.meta["val"] = exp.meta["val"].shape[0]
    remainder.update_arg(1, size)
    (region,) = partition(graph, find_hoisted(graph))
    check_region(region.nodes, region.outputs)
    assert [op_name(n) for n in region.outputs] == ["tanh"]


def test_an_op_without_a_row_stands_between_regions() -> None:
    found = regions(lambda x: torch.sort(x.exp(), dim=-1)[0].sin(), X)
    assert found == [["exp"], ["sin"]]


def test_what_depends_on_sizes_is_not_prepared() -> None:
    table = torch.randn(9, 4)

    class Cut(nn.Module):
        def forward(self, x):
            return x * table[: x.shape[1]].sum() * table[x.shape[1] - 1].exp()

    graph = capture(Cut().eval(), (torch.zeros(2, 3, 4),), {}).graph_module.graph
    assert not find_hoisted(graph)


def test_values_of_parameters_alone_are_prepared() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8))

        def forward(self, x):
            return x * self.weight.exp()

    graph = capture(Scaled().eval(), (X,), {}).graph_module.graph
    hoisted = find_hoisted(graph)
    assert [op_name(n) for n in hoisted] == ["exp"]
    kinds = {op_name(n): kind_of(n, hoisted) for n in graph.nodes if n.op == "call_function"}
    assert kinds["exp"] == "hoisted"
    assert kinds["mul"] == "computed"


def test_what_gets_too_deep_is_cut() -> None:
    """Lowering goes down a path by calls: a hundred sines and additions were too many."""

    def function(x):
        for _ in range(MOST_DEEP):
            x = x.sin() + 1
        return x

    assert [len(r) for r in regions(function, X)] == [MOST_DEEP, MOST_DEEP]
    torch.testing.assert_close(turbotx.optimize(function)(X), function(X))


def test_a_deep_value_with_one_late_reader_stays() -> None:
    def function(x, w):
        y = x
        for _ in range(MOST_DEEP):
            y = y.sin()
        return ((x @ w) @ w) + y

    assert [len(r) for r in regions(function, X, W)] == [MOST_DEEP, 1]
