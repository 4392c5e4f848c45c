"""Lower: nodes become the statements of one kernel, printed; or a FusionConflict says why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from turbotx import ir
from turbotx.ir import fx_nodes as g
from turbotx.ir.printer import show_kernel
from turbotx.ir.views import is_view
from turbotx.kernels.lowering.lower import Lowered, lower
from turbotx.ops.loop_nest import FusionConflict

aten = torch.ops.aten


class Graph:
    """Nodes made by hand, with their fake values."""

    def __init__(self) -> None:
        self.graph, self.mode = fx.Graph(), FakeTensorMode()

    def tensor(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        like = next(iter(self.graph.nodes))
        return g.emit(like, target, *args, **kwargs)


@pytest.fixture
def made() -> Graph:
    return Graph()


def lowered(*outputs: fx.Node, stored: tuple[fx.Node, ...] = ()) -> Lowered:
    def loaded(node: fx.Node) -> bool:
        return node.op == "placeholder" or (node in stored and not is_view(node))

    return lower(outputs, loaded, "fused", ())


def text(*outputs: fx.Node, stored: tuple[fx.Node, ...] = ()) -> str:
    return show_kernel(lowered(*outputs, stored=stored).kernel)


def test_views_only_move_the_index(made: Graph) -> None:
    x, bias = made.tensor("x", 2, 3, 8), made.tensor("bias", 8)
    summed = made.call(aten.add.Tensor, x, bias)
    heads = made.call(aten.view.default, summed, [2, 3, 2, 4])
    out = made.call(aten.mul.Tensor, made.call(aten.permute.default, heads, [0, 2, 1, 3]), 2.0)
    assert text(out) == (
        "fused(x: in f32[2, 3, 8], bias: in f32[8], mul: out f32[2, 2, 3, 4])\n"
        "  for row2 in 2, row1 in 2, row in 3, col in 4\n"
        "    x_ = x[col + 8*row + 4*row1 + 24*row2]\n"
        "    x1 = bias[col + 4*row1]\n"
        "    add = add(x_, x1)\n"
        "    c = 2.0 as f32\n"
        "    mul_ = mul(add, c)\n"
        "    mul[col + 4*row + 12*row1 + 24*row2] = mul_"
    )


def test_a_reduction_shares_the_loop_of_what_reads_it(made: Graph) -> None:
    x = made.tensor("x", 4, 8)
    out = made.call(aten.sub.Tensor, x, made.call(aten.amax.default, x, [1], True))
    assert text(out) == (
        "fused(x: in f32[4, 8], sub: out f32[4, 8])\n"
        "  for row in 4, reduced over col in 8\n"
        "    x_ = x[col + 8*row]\n"
        "    max = reduce max(x_)\n"
        "    sub_ = sub(x_, max)\n"
        "    sub[col + 8*row] = sub_"
    )


def test_a_scan_runs_along_the_loop_that_stores_it(made: Graph) -> None:
    mask = made.tensor("mask", 4, 8, dtype=torch.int64)
    out = made.call(aten.mul.Tensor, made.call(aten.cumsum.default, mask, 1), mask)
    assert text(out) == (
        "fused(mask: in i64[4, 8], mul: out i64[4, 8])\n"
        "  for row in 4, reduced over col in 8\n"
        "    k = mask[col + 8*row]\n"
        "    running_sum = scan sum(k)\n"
        "    mul_ = mul(running_sum, k)\n"
        "    mul[col + 8*row] = mul_"
    )


def test_what_is_stored_is_loaded(made: Graph) -> None:
    x = made.tensor("x", 4)
    first = made.call(aten.exp.default, x)
    out = made.call(aten.neg.default, first)
    assert "exp(" in text(out)
    assert lowered(out, stored=(first,)).operands == (first, out)
    assert "exp(" not in text(out, stored=(first,))


def test_outputs_share_loads_and_values(made: Graph) -> None:
    x = made.tensor("x", 4)
    exp = made.call(aten.exp.default, x)
    found = text(exp, made.call(aten.mul.Tensor, exp, exp))
    assert found.count("exp(") == found.count("= x[") == 1


def reversed_scan(made: Graph) -> tuple[fx.Node, ...]:
    scan = made.call(aten.cumsum.default, made.tensor("x", 4, 8), 1)
    return (made.call(aten.flip.default, scan, [1]),)


def sums_over_different_axes(made: Graph) -> tuple[fx.Node, ...]:
    x = made.tensor("x", 4, 8)
    rows = made.call(aten.sum.dim_IntList, x, [1], True)
    return (made.call(aten.add.Tensor, made.call(aten.sum.dim_IntList, x, [0], True), rows),)


def outputs_of_different_axes(made: Graph) -> tuple[fx.Node, ...]:
    return tuple(made.call(aten.exp.default, made.tensor(n, s)) for n, s in (("x", 4), ("y", 6)))


def a_small_output_beside_a_large_one(made: Graph) -> tuple[fx.Node, ...]:
    small = made.call(aten.exp.default, made.tensor("x", 8))
    return (made.call(aten.add.Tensor, made.tensor("y", 4, 8), small), small)


def a_sum_inside_a_cat(made: Graph) -> tuple[fx.Node, ...]:
    x = made.tensor("x", 4, 8)
    summed = made.call(aten.sum.dim_IntList, x, [1], True)
    return (made.call(aten.cat.default, [x, summed], 1),)


def test_the_halves_of_a_normalised_row_share_its_sum(made: Graph) -> None:
    x = made.tensor("x", 4, 8)
    row = made.call(aten.softmax.int, x, 1)
    halves = [made.call(aten.slice.Tensor, row, 1, k, k + 4) for k in (4, 0)]
    out = made.call(aten.add.Tensor, row, made.call(aten.cat.default, halves, 1))
    body = lowered(out).kernel.body
    assert sum(isinstance(s, ir.Reduce) for s in body) == 1


REFUSED: dict[Callable[[Graph], tuple[fx.Node, ...]], str] = {
    reversed_scan: "cumsum is read at other places than it runs along",
    sums_over_different_axes: "reduces over another axis than the rest of the run",
    outputs_of_different_axes: "exp_1 iterates over other axes than exp",
    a_small_output_beside_a_large_one: "exp would be stored 4 times by the loops of add",
    a_sum_inside_a_cat: "reduces inside a masked part",
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.__name__)
def test_must_not_be_one_kernel(case: Callable[[Graph], tuple[fx.Node, ...]], made: Graph) -> None:
    with pytest.raises(FusionConflict, match=REFUSED[case]):
        lowered(*case(made))


def test_lowering_twice_gives_the_same(made: Graph) -> None:
    x = made.tensor("x", 4, 8)
    out = made.call(aten.softmax.int, x, 1)
    assert lowered(out).kernel == lowered(out).kernel
