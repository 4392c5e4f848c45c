"""Fake results: computed once for equal arguments, and never for two that could be told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from tests.compiled_functions import compile_function
from turbotx.ir.attention_ops import attention
from turbotx.ir.fake_results import fake_result

aten = torch.ops.aten


@pytest.fixture(scope="module")
def inputs() -> list[torch.Tensor]:
    """Fake tensors: two of (batch, seq, 8), one of (8, 8)."""

    def function(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x + y + w.sum()

    made = compile_function(function, torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8, 8))
    found = [n.meta["val"] for n in made.graph.find_nodes(op="placeholder")]
    assert len(found) == 3
    return found


def call(target: Any, *args: Any, **kwargs: Any) -> Any:
    return fake_result(target, args, kwargs, args[0].fake_mode)


def test_equal_calls_are_computed_once(inputs: list[torch.Tensor]) -> None:
    x, w = inputs[0], inputs[2]
    call(aten.matmul.default, x, w)  # finds that two sizes are one
    first = call(aten.matmul.default, x, w)
    assert call(aten.matmul.default, x, w) is first
    assert call(aten.exp.default, x) is call(aten.exp.default, x)
    assert first.shape[:2] == x.shape[:2]
    q = x.unsqueeze(1)
    assert call(attention, q, q, q, scale=1.0) is call(attention, q, q, q, scale=1.0)
    assert call(attention, q, q, q, scale=1.0) is not call(attention, q, q, q, scale=2.0)


def test_other_arguments_are_other_calls(inputs: list[torch.Tensor]) -> None:
    x = inputs[0]
    kept = call(aten.sum.dim_IntList, x, [1], True)
    assert (kept.dim(), call(aten.sum.dim_IntList, x, [1], False).dim()) == (3, 2)
    assert call(aten.sum.dim_IntList, x, [0], True).shape[0] == 1
    assert call(aten.mul.Tensor, x.int(), 1).dtype == torch.int32
    assert call(aten.mul.Tensor, x.int(), 1.0).dtype == torch.float32
    turned = x.transpose(0, 2)
    assert call(aten.exp.default, turned).stride() == turned.stride() != x.stride()


def test_views_are_of_their_own_argument(inputs: list[torch.Tensor]) -> None:
    for one in inputs[:2]:
        made = call(aten.permute.default, one, [1, 0, 2])
        assert made.untyped_storage()._cdata == one.untyped_storage()._cdata


def test_sizes_by_values_are_new_ones(inputs: list[torch.Tensor]) -> None:
    first, second = (call(aten.nonzero.default, inputs[0]) for _ in range(2))
    assert free_unbacked_symbols(first) and first is not second
