"""Ops that ATen runs on purpose have a reason of their own, and no row."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tests.graphs import captured_graph, node
from turbotx.ops import OPS, is_computed, why_outside
from turbotx.ops.fallback_ops import REASONS

aten = torch.ops.aten


def why(target: Any) -> str:
    return why_outside(fx.Graph().call_function(target))


def test_reasons() -> None:
    assert why(aten.topk.default).startswith("aten.topk.default orders a row")
    assert why(aten.convolution.default).endswith("the vendor's library does that")
    assert why(aten.special_i0e.default) == "aten.special_i0e.default has no row in the op table"


def test_a_float_of_sizes_that_no_kernel_computes() -> None:
    graph = captured_graph(lambda x: x * round(x.shape[1] * 0.3, 1), torch.randn(2, 5))
    product = node(graph, "mul_1")
    assert not is_computed(product)
    assert "takes a float made of sizes" in why_outside(product)


def test_an_op_is_either_in_the_table_or_outside() -> None:
    computed = {target.overloadpacket.__name__ for target in OPS}
    assert not computed & set(REASONS)
    assert all(hasattr(aten, name) for name in REASONS)
