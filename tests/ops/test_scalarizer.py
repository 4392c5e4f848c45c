"""Pull: one element of a node as statements; what is loaded, computed, masked and checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from turbotx import ir
from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import ZERO, expr
from turbotx.ir.printer import show_statement
from turbotx.ops.loop_nest import FusionConflict, LoopNest
from turbotx.ops.scalarizer import Scalarizer

aten = torch.ops.aten
MODE = FakeTensorMode()


def tensor(graph: fx.Graph, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
    node = graph.placeholder(name)
    with MODE:
        node.meta["val"] = torch.empty(shape, dtype=dtype)
    return node


def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    like = next(a for a in args if isinstance(a, fx.Node))
    return g.emit(like, target, *args, **kwargs)


@pytest.fixture
def graph() -> fx.Graph:
    return fx.Graph()


def pulled(node: fx.Node) -> tuple[Scalarizer, list[str]]:
    """Pull the element at the loops over the node's own shape."""
    b = Scalarizer(lambda n: n.op == "placeholder", LoopNest({}))
    index = tuple(b.loops.make(extent, f"a{d}") for d, extent in enumerate(g.shape(node)))
    b.element(node, index)
    return b, [show_statement(s) for s in b.body]


def test_promotion_meets_in_the_result_s_dtype(graph: fx.Graph) -> None:
    x = tensor(graph, "x", 4, dtype=torch.bfloat16)
    k = tensor(graph, "k", 4, dtype=torch.int64)
    _, lines = pulled(call(aten.add.Tensor, x, k))
    assert lines == ["x = x[a0]", "k = k[a0]", "cast = cast(k) as f32", "add = add(x, cast)"]


def test_a_comparison_meets_in_its_arguments_dtype(graph: fx.Graph) -> None:
    k = tensor(graph, "k", 4, dtype=torch.int32)
    b, lines = pulled(call(aten.gt.Scalar, k, 2))
    assert lines == ["k = k[a0]", "c = 2 as i32", "gt = gt(k, c)"]
    assert b.body[-1].dtype is torch.bool  # type: ignore[union-attr]


def test_broadcasting_reads_place_zero(graph: fx.Graph) -> None:
    x, row = tensor(graph, "x", 4, 8), tensor(graph, "row", 4, 1)
    _, lines = pulled(call(aten.mul.Tensor, x, row))
    assert lines == ["x = x[8*a0 + a1]", "x1 = row[a0]", "mul = mul(x, x1)"]


def test_a_gathered_index_is_checked_before_it_is_used(graph: fx.Graph) -> None:
    table, ids = tensor(graph, "table", 10, 8), tensor(graph, "ids", 4, dtype=torch.int64)
    _, lines = pulled(call(aten.embedding.default, table, ids))
    assert lines == ["k = ids[a0]", "check 0 <= k < 10", "x = table[8*k + a1]"]


def test_a_known_index_needs_no_check() -> None:
    b = Scalarizer(lambda n: n.op == "placeholder", LoopNest({}))
    place = b.loops.make(expr(4), "a0")
    assert b.position(b.index(place + 1), expr(5)) == place + 1
    assert not [s for s in b.body if isinstance(s, ir.Check)]


def test_a_pad_reads_only_inside(graph: fx.Graph) -> None:
    _, lines = pulled(call(aten.constant_pad_nd.default, tensor(graph, "x", 4), [1, 0], 5.0))
    assert lines[-3:] == ["x = x[a0 - 1] if ge", "c2 = 5.0 as f32", "where_ = where(ge, x, c2)"]


def test_equal_elements_are_pulled_once(graph: fx.Graph) -> None:
    x = tensor(graph, "x", 4)
    turned = call(aten.flip.default, call(aten.flip.default, x, [0]), [0])
    _, lines = pulled(call(aten.add.Tensor, turned, x))
    assert lines == ["x = x[a0]", "add = add(x, x)"]


def test_a_reduction_of_one_element_is_that_element(graph: fx.Graph) -> None:
    b, lines = pulled(call(aten.amax.default, tensor(graph, "x", 4, 1), [1]))
    assert lines[0] == "x = x[a0]"
    assert not [s for s in b.body if isinstance(s, ir.Reduce)]


def test_a_scan_of_one_element_is_that_element(graph: fx.Graph) -> None:
    _, lines = pulled(call(aten.cumsum.default, tensor(graph, "x", 4, 1), 1))
    assert lines == ["x = x[a0]"]


def test_a_reduction_must_not_stand_at_a_gathered_place(graph: fx.Graph) -> None:
    x, ids = tensor(graph, "x", 4, 8), tensor(graph, "ids", 3, dtype=torch.int64)
    summed = call(aten.sum.dim_IntList, x, [1])
    with pytest.raises(FusionConflict, match="reduces at a gathered position"):
        pulled(call(aten.index.Tensor, summed, [ids]))


def test_a_number_is_an_element() -> None:
    b = Scalarizer(lambda n: True, LoopNest({}))
    assert b.element(2.5, (ZERO,)).value == 2.5
