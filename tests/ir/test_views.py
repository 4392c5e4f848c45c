"""Views and layouts, against torch's own strides: chains of views over random shapes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from turbotx.ir.expr import ZERO, dim
from turbotx.ir.strides import layout_of, reshape_strides, root_layout
from turbotx.ir.views import NeedsFactoring, input_index, is_view, reshape_index, view_source

aten = torch.ops.aten


def graph_of(shape: tuple[int, ...]) -> tuple[fx.Node, FakeTensorMode]:
    mode = FakeTensorMode()
    x = fx.Graph().placeholder("x")
    with mode:
        x.meta["val"] = torch.empty(shape)
    return x, mode


def draw_view(draw: st.DrawFn, t: torch.Tensor) -> tuple[Any, tuple[Any, ...]] | None:
    """Return a view op and its arguments after the tensor, that torch accepts without a copy."""
    rank = t.dim()
    kind = draw(st.sampled_from(["permute", "transpose", "unsqueeze", "squeeze", "expand", "slice",
                                 "select", "view", "diagonal", "unfold", "split"]))  # fmt: skip
    d = draw(st.integers(-rank, rank - 1)) if rank else 0
    if kind == "unsqueeze":
        return aten.unsqueeze.default, (draw(st.integers(-rank - 1, rank)),)
    if rank == 0:
        return None
    if kind == "permute":
        return aten.permute.default, (draw(st.permutations(range(rank))),)
    if kind == "transpose":
        return aten.transpose.int, (d, draw(st.integers(-rank, rank - 1)))
    if kind == "squeeze":
        return aten.squeeze.dim, (d,)
    if kind == "expand":
        sizes = [draw(st.sampled_from([1, 3])) if n == 1 else n for n in t.shape]
        return aten.expand.default, ([draw(st.integers(1, 2)), *sizes],)
    if kind == "slice":
        begin = draw(st.integers(-t.shape[d], t.shape[d] - 1))
        end = draw(st.sampled_from([t.shape[d], 2**63 - 1]))
        return aten.slice.Tensor, (d, begin, end, draw(st.integers(1, 3)))
    if kind == "select":
        return aten.select.int, (d, draw(st.integers(-t.shape[d], t.shape[d] - 1)))
    if kind == "diagonal" and rank >= 2:
        return aten.diagonal.default, (0, 0, draw(st.integers(1, rank - 1)))
    if kind == "unfold":
        size = draw(st.integers(1, t.shape[d]))
        return aten.unfold.default, (d, size, draw(st.integers(1, 2)))
    if kind == "view":
        return aten.view.default, (draw_factors(draw, t.numel()),)
    return None


def draw_factors(draw: st.DrawFn, count: int) -> list[int]:
    factors = []
    while count > 1 and len(factors) < 4:
        n = draw(st.sampled_from([n for n in range(1, count + 1) if count % n == 0]))
        factors.append(n)
        count //= n
    return [*factors, count]


@settings(max_examples=150)
@given(st.data())
def test_layouts_are_torchs_strides(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)))
    node, mode = graph_of(shape)
    real = torch.arange(math.prod(shape)).reshape(shape)
    for _ in range(data.draw(st.integers(1, 5))):
        drawn = draw_view(data.draw, real)
        if drawn is None:
            continue
        target, args = drawn
        try:
            made = target(real, *args)
        except RuntimeError:  # a view that needs a copy, a dim that does not fit
            continue
        real = made
        node = node.graph.call_function(target, (node, *args))
        with mode:
            node.meta["val"] = torch.empty_strided(real.shape, real.stride())
    if real.numel() == 0:
        return
    layout = layout_of(node)
    assert layout is not None
    base = torch.arange(math.prod(shape))
    window = base.as_strided(
        [int(n) for n in layout.shape], [int(s) for s in layout.strides], int(layout.offset)
    )
    assert torch.equal(window, real)


@settings(max_examples=100)
@given(st.data())
def test_reshape_indices_name_the_same_element(data: st.DataObject) -> None:
    count = data.draw(st.sampled_from([1, 6, 12, 24, 30]))
    shape, source = (draw_factors(data.draw, count) for _ in range(2))
    flat = data.draw(st.integers(0, count - 1))
    place, rest = [], flat
    for n in reversed(shape):
        place.insert(0, sympy.Integer(rest % n))
        rest //= n

    def split(i: sympy.Expr, by: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
        return sympy.Integer(int(i) // int(by)), sympy.Integer(int(i) % int(by))

    sizes = [sympy.Integer(n) for n in shape], [sympy.Integer(n) for n in source]
    inner = reshape_index(place, *sizes, split)
    found = 0
    for i, n in zip(inner, source, strict=True):
        assert 0 <= int(i) < n
        found = found * n + int(i)
    assert found == flat


def test_a_reshape_of_a_transpose_has_no_strides() -> None:
    node, mode = graph_of((2, 3))
    turned = node.graph.call_function(aten.permute.default, (node, [1, 0]))
    flat = node.graph.call_function(aten.view.default, (turned, [6]))
    with mode:
        turned.meta["val"], flat.meta["val"] = torch.empty(3, 2), torch.empty(6)
    assert layout_of(turned) is not None
    assert layout_of(flat) is None
    assert is_view(flat) and view_source(flat) is turned
    with pytest.raises(NeedsFactoring):
        input_index(flat, (ZERO,))


def test_what_is_merged_and_split_again_needs_no_copy() -> None:
    node, mode = graph_of((5, 3, 8))
    keys = node.graph.call_function(aten.slice.Tensor, (node, 2, 4, 8))  # rows of 4 in rows of 8
    merged = node.graph.call_function(aten.view.default, (keys, [5, 6, 2]))
    turned = node.graph.call_function(aten.permute.default, (merged, [1, 0, 2]))
    heads = node.graph.call_function(aten.view.default, (turned, [3, 2, 5, 2]))
    lost = node.graph.call_function(aten.view.default, (turned, [2, 3, 5, 2]))
    with mode:
        for made, shape in (
            (keys, (5, 3, 4)), (merged, (5, 6, 2)), (turned, (6, 5, 2)),
            (heads, (3, 2, 5, 2)), (lost, (2, 3, 5, 2)),
        ):  # fmt: skip
            made.meta["val"] = torch.empty(shape)
    assert layout_of(merged) is None
    found = layout_of(heads)
    assert found is not None
    base = torch.arange(5 * 3 * 8)
    real = base.view(5, 3, 8)[:, :, 4:].reshape(5, 6, 2).permute(1, 0, 2).reshape(3, 2, 5, 2)
    strides = [int(s) for s in found.strides]
    assert torch.equal(base.as_strided(real.shape, strides, int(found.offset)), real)
    assert layout_of(lost) is None


def test_symbolic_head_split() -> None:
    batch, seq = dim("batch"), dim("seq")
    node, _ = graph_of((2, 3, 8))
    below = root_layout(node)
    below = type(below)(node, (batch, seq, sympy.Integer(8)),
                        (8 * seq, sympy.Integer(8), sympy.Integer(1)), ZERO)  # fmt: skip
    strides = reshape_strides(below, (batch, seq, sympy.Integer(2), sympy.Integer(4)))
    assert strides == (8 * seq, 8, 4, 1)
    assert reshape_strides(below, (batch * seq, sympy.Integer(8))) == (8, 1)
    turned = type(below)(node, (seq, batch, sympy.Integer(8)),
                         (sympy.Integer(8), 8 * seq, sympy.Integer(1)), ZERO)  # fmt: skip
    assert reshape_strides(turned, (batch * seq, sympy.Integer(8))) is None
    assert reshape_strides(turned, (seq, 8 * batch)) is None
