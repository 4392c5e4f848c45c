"""Where a view's elements lie in the tensor that holds them.

In: an fx node that is a chain of views. Out: its `Layout`: the root node that owns the memory,
and shape, strides and offset in elements of the root, all symbolic, or None where the view
cannot be expressed by strides (then it must be computed by a kernel). Example::

    layout_of(permute(view(linear)))  ->  root linear, strides (1152*seq, 32, 1152, 1), offset 384
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from turbotx import graph as g
from turbotx.sizes import ONE, ZERO, Expr, divide, expr, product
from turbotx.views import VIEWS, input_index, is_view, view_source


@dataclass(frozen=True)
class Layout:
    """A strided window on a root: sizes and strides per dim and the offset, in elements."""

    root: fx.Node
    shape: tuple[Expr, ...]
    strides: tuple[Expr, ...]
    offset: Expr

    @property
    def is_contiguous(self) -> bool:
        return self.offset == 0 and self.strides == contiguous_strides(self.shape)


def contiguous_strides(shape: Sequence[Expr]) -> tuple[Expr, ...]:
    """Return the strides of a dense row-major tensor, 0 for dims of size 1."""
    strides: list[Expr] = []
    step: Expr = ONE
    for extent in reversed(shape):
        strides.append(ZERO if extent == 1 else step)
        step = product((step, extent))
    return tuple(reversed(strides))


def root_layout(node: fx.Node) -> Layout:
    """Return the layout of a node that owns its memory: dense, or the user's own for parameters."""
    shape = g.shape(node)
    strides = contiguous_strides(shape)
    if node.op == "get_attr":
        given = g.strides(node)
        strides = tuple(ZERO if n == 1 else s for n, s in zip(shape, given, strict=True))
    return Layout(node, shape, strides, ZERO)


def layout_of(node: fx.Node) -> Layout | None:
    """Return the node's layout over its root, or None where strides cannot express it."""
    if not is_view(node) or not g.is_tensor(node):
        return root_layout(node)
    layout = layout_with_copies(node)
    return None if is_view(layout.root) else layout


def layout_with_copies(node: fx.Node) -> Layout:
    """Return the node's layout where views that strides cannot express are copies: then its root
    is the last such view below it, dense."""
    if not is_view(node) or not g.is_tensor(node):
        return root_layout(node)
    below = layout_with_copies(view_source(node))
    if VIEWS[node.target] != "reshape":
        return _affine(node, below)
    strides = reshape_strides(below, g.shape(node))
    if strides is None:
        return root_layout(node)
    return Layout(below.root, g.shape(node), strides, below.offset)


def _affine(node: fx.Node, below: Layout) -> Layout:
    """Probe the view's index map, which is affine per dim, at zero and at each unit vector."""
    shape = g.shape(node)
    zero: list[Any] = [ZERO] * len(shape)

    def flat(index: Sequence[Expr]) -> Expr:
        inner = input_index(node, tuple(index))
        terms = (i * s for i, s in zip(inner, below.strides, strict=True))
        return expr(sum(terms, ZERO)).expand()

    start = flat(zero)
    strides = []
    for d, extent in enumerate(shape):
        unit = list(zero)
        unit[d] = ONE
        strides.append(ZERO if extent == 1 else (flat(unit) - start).expand())
    return Layout(below.root, shape, tuple(strides), (below.offset + start).expand())


def reshape_strides(below: Layout, shape: tuple[Expr, ...]) -> tuple[Expr, ...] | None:
    """Return strides that show `below` under another shape, or None if that needs a copy.

    Merges below's dims where stride[i] == stride[i+1] * size[i+1], then splits them to fit.
    """
    merged: list[list[Expr]] = []
    for extent, stride in zip(below.shape, below.strides, strict=True):
        if extent == 1:
            continue
        if merged and (merged[-1][1] - stride * extent).expand() == 0:
            merged[-1] = [product((merged[-1][0], extent)), stride]
        else:
            merged.append([extent, stride])
    strides: list[Expr] = [ZERO] * len(shape)
    d = len(shape) - 1
    for extent, stride in reversed(merged):
        left, step = extent, stride
        while left != 1:
            while d >= 0 and shape[d] == 1:
                d -= 1
            rest = divide(left, shape[d]) if d >= 0 else None
            if rest is None:
                return None
            strides[d] = step
            step = product((step, shape[d]))
            left, d = rest, d - 1
    return tuple(strides) if all(n == 1 for n in shape[: d + 1]) else None
