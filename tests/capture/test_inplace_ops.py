"""In-place ops: those that only the graph sees are written as ops that make a new tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

import turbotx
from tests.graphs import captured
from turbotx.capture.inplace_ops import write_out_of_place
from turbotx.errors import CaptureError


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


def widens(x: torch.Tensor) -> torch.Tensor:
    y = x.bfloat16()
    y += x
    return y.float()


def of_one_result(x: torch.Tensor) -> torch.Tensor:
    values, places = x.topk(2, -1)
    values /= values.sum(-1, keepdim=True)
    return values + places


def a_part(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, 0] += 1
    return y


def a_row_of_another_dtype(x: torch.Tensor) -> torch.Tensor:
    y = (x * 2).bfloat16()
    y[:, -1] = x[:, 0].double() + 0.001
    return y


def what_is_broadcast(x: torch.Tensor) -> torch.Tensor:
    y = x.new_zeros(x.shape[0], x.shape[1] + 3, 4, dtype=torch.long)
    y[:, 2:, 1:3] = x[:, :1, :1]
    y[..., 3] = x.sum()
    y[:, -2:] += x[..., :1].sum((0, 1), keepdim=True).long()
    return y


def steps(x: torch.Tensor) -> torch.Tensor:
    y = x.flip(-1)
    y[:, 1::2, ::3] = -1
    y[::2, :, None, -3:-1].mul_(2)
    y.transpose(1, 2)[:, 1] = x[..., 0]
    y.view(*x.shape[:2], 2, 2)[..., 1] = 0.5
    return y


def what_overlaps(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    y[..., 1:] = y[..., :-1].clone() + y[..., 1:]
    y[..., :2], y[..., 2:] = y[..., 2:].clone(), y[..., :2].clone()
    return y


def by_a_size(x: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(x.shape[0], 2 * x.shape[1], dtype=torch.bool)
    mask[..., x.shape[1] :] = x[..., 0] > 0
    mask[:, : x.shape[1]].logical_not_()
    return mask


def looked_at_before(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x * 2
    first, last = y[:, :1], y.select(1, -1)
    row, sums = last[1:], y.sum(1)
    y += 1
    first.relu_()
    return y, first, last * 2, row, sums


def looked_at_within(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x * 2
    row = y[:, 0]
    row[:, 1:] = 3
    first = row.clamp_(max=1)
    y[..., 2] = first[:, :1]
    return y.relu(), row + first, y


def copied_before(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    z = y.reshape(-1).sum()  # a view, perhaps, that nothing looks at afterwards
    y[:, 0] = z
    return y


def copied_to_a_turned_view(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x * 2
    z, w = y.transpose(0, 1), x.transpose(0, 1) * 3
    z.index_copy_(0, torch.tensor([0]), x[:, :1].transpose(0, 1))
    w.index_copy_(0, torch.tensor([0]), x[:, :1].transpose(0, 1))
    return y, z, w


def a_mask_by_index(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, 1:][x[:, 1:] > 0] = -1.0
    y[:, 0].masked_fill_(x[:, 0] > 0, 7.0)
    return y


def of_one_operand(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    z = torch.einsum("bij->bji", y)
    z += 1
    return y.sum(2) + z.sum(1)


def perhaps_a_view(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    z = y.transpose(0, 1).reshape(-1, 4)
    y[:, 0] = 1
    return y.sum() + z


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


def strides(results: Any) -> list[list[int]]:
    """Return the strides of the dims of more than one element."""
    tensors = [t for t in pytree.tree_leaves(results) if t.numel()]
    return [[s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1] for t in tensors]


WHOLE = [adds, fills, puts, scores, widens, of_one_result]
PARTS = [
    a_part, a_row_of_another_dtype, what_is_broadcast, steps, what_overlaps, by_a_size,
    looked_at_before, looked_at_within, copied_before, a_mask_by_index, copied_to_a_turned_view,
]  # fmt: skip


@pytest.mark.parametrize("function", WHOLE + PARTS)
def test_a_tensor_of_the_graphs_own(function, monkeypatch) -> None:
    before, after = changes(function)
    assert before and not after

    def trace_again(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a second trace of the whole")

    monkeypatch.setattr(ExportedProgram, "run_decompositions", trace_again)
    fast = turbotx.optimize(function, backend="aten")
    for shape in ((2, 4, 4), (1, 1, 4), (3, 7, 4), (0, 3, 4)):
        x = torch.randn(shape)
        came, right = fast(x), function(x)
        torch.testing.assert_close(came, right)
        assert strides(came) == strides(right)


@pytest.mark.parametrize("function", [of_one_operand, perhaps_a_view])
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
    for view in (None, torch.ops.aten.alias.default):
        graph = fx.Graph()
        x = graph.placeholder("x")
        changed = x if view is None else graph.call_function(view, (x,))
        graph.output(graph.call_function(torch.ops.aten.add_.Tensor, (changed, 1)))
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


def test_what_draws_in_place_draws_the_same(monkeypatch) -> None:
    def draws(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = torch.empty_like(x).uniform_(-1, 2)
        z = (x * 2).normal_(1.0, 0.5).add_(y)
        return y, z, torch.zeros(3).exponential_()

    monkeypatch.setattr(ExportedProgram, "run_decompositions", None)
    fast = turbotx.optimize(draws)
    for shape in ((2, 4, 4), (1, 2, 40), (3, 7, 4)):
        x = torch.randn(shape)
        torch.manual_seed(3)
        right = draws(x), draws(x)
        torch.manual_seed(3)
        torch.testing.assert_close((fast(x), fast(x)), right)
    assert not torch.equal(fast(x)[0], fast(x)[0])


@pytest.mark.parametrize(
    "draw",
    [
        lambda y: y[:, 1:].normal_(), lambda y: y[:, 0].bernoulli_(0.5), lambda y: y.t().uniform_(),
        lambda y: y[:, ::2].random_(5),
    ],
    ids=["columns", "a column", "turned", "every other"],
)  # fmt: skip
def test_what_draws_into_a_tensor_that_is_not_dense_is_refused(draw: Callable[..., Any]) -> None:
    """Its numbers for a seed depend on how it lies in memory."""

    def f(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        draw(y)
        return y

    with pytest.raises(CaptureError, match=r"draws into a tensor that is not dense at \S*\.py:\d+"):
        turbotx.optimize(f)(torch.ones(8, 9))


def test_what_draws_into_dense_rows_draws_eagers_numbers() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y[1:].normal_()
        return y

    fast = turbotx.optimize(f)
    for shape in ((8, 9), (3, 40)):
        x = torch.ones(shape)
        torch.manual_seed(3)
        want = f(x)
        torch.manual_seed(3)
        assert torch.equal(fast(x), want)
