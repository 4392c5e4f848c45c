"""Fuse and lower: how many kernels a run takes, over which axes, and the reason in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import turbotx
from tests.compiled_functions import by_interpreter, compile_function
from turbotx import ir
from turbotx.kernels.fusion.inplace import find_inplace
from turbotx.ops.scalarizer import MOST_TIMES

TABLE, POSITIONS = torch.randn(4, 8), torch.randn(9, 8)
x = torch.randn(2, 3, 8)
mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


def axes_of(kernel: ir.Kernel) -> list[str]:
    return [f"{a.name}:{a.extent}{'*' if a.kind == 'row' else ''}" for a in kernel.axes]


ONE_KERNEL: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "elementwise merges into one axis": (lambda x: F.gelu(x) * 2, ["col:batch*seq*x_d2"]),
    "softmax": (lambda x: x.softmax(-1), ["row:batch*seq", "col:x_d2*"]),
    "softmax of a layer_norm": (
        lambda x: F.layer_norm(x, (8,)).softmax(-1),
        ["row:batch*seq", "col:8*"],
    ),
    "several outputs": (lambda x: (x + 1, (x + 1).softmax(-1)), ["row:batch*seq", "col:x_d2*"]),
    "sum over all": (lambda x: x.sum(), ["col:batch*seq*x_d2*"]),
    "sum over the first": (lambda x: x.sum(0), ["row:seq*x_d2", "col:batch*"]),
    "sum over the middle": (lambda x: x.sum(1), ["row1:batch", "row:x_d2", "col:seq*"]),
    "sum over first and last": (
        lambda x: x.sum((0, 2)),
        ["row:seq", "col1:batch*", "col:x_d2*"],
    ),
    "transposed on the way out": (
        lambda x: (x * 2).transpose(1, 2).contiguous() + 1,
        ["row1:batch", "row:x_d2", "col:seq"],
    ),
    "other shapes of the same elements": (
        lambda x: (x * 2, (x * 2).flatten(0, 1).softmax(-1)),
        ["row:batch*seq", "col:x_d2*"],
    ),
    "a copy with the dims in another order": (
        lambda x: (x * 2, (x * 3).permute(2, 0, 1).contiguous() + 1),
        ["row:batch*seq", "col:x_d2"],
    ),
    "a mask's row beside a reduction, between other outputs": (
        lambda x, m: (x + m[..., None], m > 0, F.layer_norm(x + m[..., None], (8,))),
        ["row:batch*seq", "col:8*"],
    ),
    "pooled over the sequence under a mask": (
        lambda x, m: (x * m.unsqueeze(-1)).sum(1) / m.sum(1, keepdim=True).clamp(min=1e-9),
        ["row1:batch", "row:x_d2", "col:seq*"],
    ),
    "embeddings, summed and normalised": (
        lambda x, m: F.layer_norm(
            F.embedding(m.long(), TABLE) + POSITIONS[: m.shape[1]] + x * m[..., None], (8,)
        ),
        ["row1:batch", "row:seq", "col:8*"],
    ),
    "normalised, transposed in and out": (
        lambda x: F.layer_norm(x.transpose(1, 2), (3,)).transpose(1, 2).contiguous() * 2,
        ["row1:batch", "row:x_d2", "col:3*"],
    ),
    "variances and means over several axes": (
        lambda x: (x.var((1, 2)), x.mean((1, 2)), x.amax((1, 2))),
        ["row:batch", "col:seq*x_d2*"],
    ),
    "reduction of a broadcast": (
        lambda x: (x - x.mean(-1, keepdim=True)).amax(-1),
        ["row:batch*seq", "col:x_d2*"],
    ),
}


@pytest.mark.parametrize("name", ONE_KERNEL)
def test_one_kernel(name: str) -> None:
    function, axes = ONE_KERNEL[name]
    inputs = (x, mask)[: function.__code__.co_argcount]
    made = compile_function(function, *inputs)
    assert made.reasons == [] and made.externs == []
    (kernel,) = made.kernels
    assert axes_of(kernel) == axes
    wide = function(*(t.double() for t in inputs))
    wide = wide if isinstance(wide, tuple) else (wide,)
    for ours, true in zip(made.run(inputs, by_interpreter), wide, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-6, atol=1e-6, check_dtype=False)


TWO_KERNELS: dict[str, tuple[Callable[..., Any], str]] = {
    "reductions over different axes": (
        lambda x: x.softmax(-1).sum(0),
        "softmax reduces over another axis than the rest of the run",
    ),
    "a reduction over a reduction": (
        lambda x: x - x.sum(-1).mean(),
        "sum_1 reduces over another axis than the rest of the run",
    ),
    "an output that the other's loops would store again and again": (
        lambda x: (x * x[0].exp(), x[0].exp()),
        "would be stored batch times by the loops of",
    ),
    "a scan that the loops of its reader would run again and again": (
        lambda x: x[..., 0].cumsum(1)[..., None] + x,
        "cumsum would run x_d2 times, always the same",
    ),
    "reductions of different lengths": (
        lambda x: (x.sum(-1), x.flatten(1).sum(-1)),
        "",
    ),
}


@pytest.mark.parametrize("name", TWO_KERNELS)
def test_two_kernels_with_the_reason(name: str) -> None:
    function, reason = TWO_KERNELS[name]
    made = compile_function(function, x)
    assert len(made.kernels) == 2
    assert not reason or reason in made.reasons[0]
    wide = function(x.double())
    wide = wide if isinstance(wide, tuple) else (wide,)
    for ours, true in zip(made.run((x,), by_interpreter), wide, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-10)


def test_views_cost_no_statement() -> None:
    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1], 2, 4).permute(0, 2, 1, 3).contiguous() * 2

    (kernel,) = compile_function(heads, x).kernels
    assert [type(s).__name__ for s in kernel.body] == ["Load", "Constant", "Compute", "Store"]
    load, store = kernel.body[0], kernel.body[-1]
    assert isinstance(load, ir.Load) and isinstance(store, ir.Store)
    last = kernel.axes[-1]
    assert last.extent == 4 and load.access.stride(last) == store.access.stride(last) == 1


def test_equal_values_are_computed_once() -> None:
    (kernel,) = compile_function(lambda x: x.exp() + x.exp() * x.exp().sum(-1, True), x).kernels
    ops = [s.op for s in kernel.body if isinstance(s, ir.Compute)]
    assert ops.count("exp") == 1


def test_equal_kernels_of_different_layers_have_one_digest() -> None:
    def layers(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = F.gelu(x @ w)
        return x

    made = compile_function(layers, torch.randn(2, 3, 8), torch.randn(8, 8))
    assert len(made.kernels) == 2
    assert len({k.digest() for k in made.kernels}) == 1


def test_a_gathered_index_is_checked() -> None:
    def look_up(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, table).sum(-1)

    ids = torch.tensor([[0, 4], [2, 1]])
    made = compile_function(look_up, torch.randn(5, 3), ids)
    (kernel,) = made.kernels
    (check,) = [s for s in kernel.body if isinstance(s, ir.Check)]
    assert str(check.limit) == "batch"


def test_known_positions_need_no_check() -> None:
    def shift(x: torch.Tensor) -> torch.Tensor:
        return x[:, torch.arange(x.shape[1])]

    (kernel,) = compile_function(shift, torch.randn(3, 4)).kernels
    assert not [s for s in kernel.body if isinstance(s, ir.Check)]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def test_queries_and_keys_are_rotated_by_one_kernel() -> None:
    def both(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k = x.split(8, -1)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    inputs = torch.randn(2, 3, 16), torch.randn(3, 8), torch.randn(3, 8)
    made = compile_function(both, *inputs)
    (kernel,) = made.kernels
    loads = [s.access.param for s in kernel.body if isinstance(s, ir.Load)]
    assert loads.count("cos") == loads.count("sin") == 1
    wide = both(*(t.double() for t in inputs))
    for ours, true in zip(made.run(inputs, by_interpreter), wide, strict=True):
        torch.testing.assert_close(ours, true)


def test_regions_over_other_axes_stay_apart() -> None:
    def both(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x @ w
        return y[..., :4].exp(), y.flatten(1).sum(-1)

    assert len(compile_function(both, torch.randn(2, 3, 8), torch.randn(8, 6)).kernels) == 2


def test_merged_regions_never_wait_for_each_other() -> None:
    """The second product needs the first region's result: nothing may merge across it."""

    def chain(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.exp()
        return y, (y @ w).exp() + x

    made = compile_function(chain, torch.randn(4, 4), torch.randn(4, 4))
    assert len(made.kernels) == 2


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.view(x.shape[0], x.shape[1], heads, 8).transpose(1, 2)


def grouped_rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    q, k, _ = x.split((32, 16, 16), -1)
    return rotate(split_heads(q, 4), cos, sin), rotate(split_heads(k, 2), cos, sin)


def test_fewer_key_heads_continue_the_loop_over_query_heads() -> None:
    inputs = torch.randn(2, 3, 64), torch.randn(3, 8), torch.randn(3, 8)
    made = compile_function(grouped_rotary, *inputs)
    (kernel,) = made.kernels
    assert axes_of(kernel) == ["row2:batch", "row1:seq", "row:6", "col:8"]
    assert [s.access.mask for s in kernel.body if isinstance(s, ir.Store)] == [
        "in_first", "in_second",
    ]  # fmt: skip
    assert [s.access.param for s in kernel.body if isinstance(s, ir.Load)].count("x") == 3
    assert find_inplace(kernel) == ()
    wide = grouped_rotary(*(t.double() for t in inputs))
    for ours, true in zip(made.run(inputs, by_interpreter), wide, strict=True):
        torch.testing.assert_close(ours, true)
    for ours, true in zip(turbotx.optimize(grouped_rotary)(*inputs), wide, strict=True):
        torch.testing.assert_close(ours, true.float())


def test_other_sums_over_more_heads_are_not_stacked() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 1  # keeps both in one level, without being one region
        q, k = y[..., :32], y[..., 32:48]
        return split_heads(q, 4) * 2, split_heads(k, 2) * 3

    assert len(compile_function(function, torch.randn(2, 3, 64)).kernels) == 2


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_a_scan_runs_over_a_size_that_another_expression_tells_too(scale: float) -> None:
    """Halves of an even number of columns, and a tensor with that many."""

    def scan(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        wide = torch.lerp(x.view(2, -1).reshape(1, -1), y, 0.25)
        return wide.cumsum(1) * scale

    fast = turbotx.optimize(scan)
    for count in (6, 10, 2):
        given = torch.randn(count), torch.randn(1, count)
        torch.testing.assert_close(fast(*given), scan(*given))


def test_a_value_that_many_writes_need_is_stored() -> None:
    """Each write reads what the one before has made, in two ways: computed for each, a value would
    be computed 2^n times. (The triangular inverse of gated delta rules is such a loop.)"""

    def function(x):
        x = x.clone()
        for i in range(1, 12):
            x[..., i, :i] = x[..., i, :i] * 2 + x[..., :i, :i].sum(-2)
        return x

    square = torch.randn(2, 12, 12)
    fused = compile_function(function, square)
    assert len(fused.kernels) < 22
    assert any(f"more than {MOST_TIMES} times" in reason for reason in fused.reasons)
    torch.testing.assert_close(turbotx.optimize(function)(square), function(square))
