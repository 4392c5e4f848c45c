"""Ops of several results become ops of one each, and those are computed by kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

import turbotx
from tests.compiled_functions import by_interpreter, compile_function
from turbotx.capture.callables import FunctionModule
from turbotx.capture.trace import capture
from turbotx.passes.results import use_single_results

aten = torch.ops.aten
X = torch.randn(3, 4, 6)
WEIGHT, BIAS, SPREAD = torch.randn(4), torch.randn(4), torch.rand(4) + 0.5


def ops_of(graph: fx.Graph) -> list[str]:
    return [str(n.target).removeprefix("aten.") for n in graph.nodes if n.op == "call_function"]


CASES: dict[str, Callable[[Any], Any]] = {
    "max.dim": lambda x: x.max(1),
    "min.dim": lambda x: x.min(-1, keepdim=True),
    "only the places": lambda x: x.max(2)[1] + 1,
    "whole numbers": lambda x: (x * 3).long().max(1),
    "bools": lambda x: (x > 0).min(1),
    "var_mean": lambda x: torch.var_mean(x, (0, 2)),
    "std_mean": lambda x: torch.std_mean(x, 1, correction=0, keepdim=True),
    "native_layer_norm": lambda x: torch.native_layer_norm(x, (4, 6), None, None, 1e-5),
    "native_group_norm": lambda x: torch.native_group_norm(x, WEIGHT, BIAS, 3, 4, 6, 2, 1e-5),
    "symbolic groups": lambda x: F.group_norm(x.transpose(0, 1).contiguous(), x.shape[0] // 3),
    "batch norm": lambda x: F.batch_norm(x, BIAS, SPREAD, WEIGHT, BIAS),
    "batch norm, plain": lambda x: F.batch_norm(x, BIAS, SPREAD),
}


@pytest.mark.parametrize("name", CASES)
def test_every_result_is_computed_by_a_kernel(name: str) -> None:
    function = CASES[name]
    made = compile_function(function, X)
    assert made.externs == []
    x = X.double()
    if "norm" in name:
        made_of = made.run((X,), by_interpreter)
        wide = torch.utils._pytree.tree_leaves(function(X))
        for ours, eager in zip(made_of, wide, strict=True):
            torch.testing.assert_close(ours.float(), eager, rtol=1e-5, atol=1e-5)
        return
    wide = torch.utils._pytree.tree_leaves(function(x))
    for ours, true in zip(made.run((x,), by_interpreter), wide, strict=True):
        torch.testing.assert_close(ours, true)


@pytest.mark.parametrize("extreme", [torch.max, torch.min])
def test_places_of_bools_through_pytorchs_own_ops(extreme: Callable[..., Any]) -> None:
    fast = turbotx.optimize(lambda x: extreme(x, 0)[1] * 2, backend="aten")
    for size in (5, 1):
        given = torch.rand(size, 7) < 0.5
        assert torch.equal(fast(given), extreme(given, 0)[1] * 2)


def test_both_results_of_max_share_one_reduction() -> None:
    made = compile_function(lambda x: x.max(-1), X)
    (kernel,) = made.kernels
    reduces = [s.op for s in kernel.body if type(s).__name__ == "Reduce"]
    assert sorted(reduces) == ["max", "min"]  # the largest, and the first place of it


def test_an_op_whose_results_have_no_op_stays() -> None:
    def two_largest(x: torch.Tensor) -> Any:
        return x.topk(2)

    captured = capture(FunctionModule(two_largest), (X,), {})
    before = ops_of(captured.graph_module.graph)
    use_single_results(captured.graph_module.graph)
    assert ops_of(captured.graph_module.graph) == before
    assert "topk.default" in before


def test_twice_changes_nothing() -> None:
    captured = capture(FunctionModule(lambda x: x.max(1)), (X,), {})
    graph = captured.graph_module.graph
    use_single_results(graph)
    once = ops_of(graph)
    use_single_results(graph)
    graph.lint()
    assert ops_of(graph) == once == ["amax.default", "argmax.default"]
