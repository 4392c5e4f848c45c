"""Layouts: where a view's elements lie in the tensor that owns the memory.

In: an fx node that is a chain of views. Out: its `Layout`: the root node that owns the memory, and
shape, strides and offset in elements of the root, all symbolic; or None if strides cannot express
the view (a kernel must then compute it). Example::

    layout_of(permute(view(linear)))  ->  root linear, strides (1152*seq, 32, 1152, 1), offset 384
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.cache_ops import cache_store
from turbotx.ir.expr import ONE, ZERO, Expr, dim, divide, expr, product
from turbotx.ir.views import VIEWS, input_index, is_view, view_source

aten = torch.ops.aten
PERMUTATIONS = (aten.permute.default, aten.transpose.int, aten.t.default)


@dataclass(frozen=True)
class Layout:
    """A strided window on a root: shape, and strides and offset in elements."""

    root: fx.Node
    shape: tuple[Expr, ...]
    strides: tuple[Expr, ...]
    offset: Expr

    @property
    def is_contiguous(self) -> bool:
        """Whether the window is dense, row-major and starts at the root's first element."""
        return self.offset == 0 and self.strides == contiguous_strides(self.shape)


def contiguous_strides(shape: Sequence[Expr]) -> tuple[Expr, ...]:
    """Return the strides of a dense row-major tensor, 0 for dims of size 1."""
    return _contiguous_strides(tuple(shape))


@lru_cache(maxsize=65536)
def _contiguous_strides(shape: tuple[Expr, ...]) -> tuple[Expr, ...]:
    strides: list[Expr] = []
    step: Expr = ONE
    for extent in reversed(shape):
        strides.append(ZERO if extent == 1 else step)
        step = product((step, extent))
    return tuple(reversed(strides))


def root_layout(node: fx.Node) -> Layout:
    """Return the layout of a node that owns its memory: dense; the user's strides for a parameter;
    or a layer's place in a cache."""
    shape = g.shape(node)
    strides = contiguous_strides(shape)
    if node.target is cache_store:
        capacity = g.shape(g.operand(node, 0))[2]
        room = (shape[0], shape[1], capacity, shape[3])
        place = product((expr(node.args[4]), shape[0], capacity))
        return Layout(node, shape, contiguous_strides(room), place)
    if node.op == "get_attr":
        given = g.strides(node)
        strides = tuple(ZERO if n == 1 else s for n, s in zip(shape, given, strict=True))
    return Layout(node, shape, strides, ZERO)


def layout_of(node: fx.Node) -> Layout | None:
    """Return the node's layout over its root, or None if strides cannot express it."""
    if not is_view(node) or not g.is_tensor(node):
        return root_layout(node)
    layout = layout_with_copies(node)
    return None if is_view(layout.root) else layout


def layout_with_copies(node: fx.Node) -> Layout:
    """Return the node's layout, treating views that strides cannot express as dense copies: the
    last such view is then the root. A merge that is only split again needs no copy."""
    if not is_view(node) or not g.is_tensor(node):
        return root_layout(node)
    nested = _nest(node)
    flat = None if nested is None else nested.flat()
    if flat is not None:
        return flat
    below = layout_with_copies(view_source(node))
    if VIEWS[node.target] != "reshape":
        return _affine(node, below)
    strides = reshape_strides(below, g.shape(node))
    if strides is None:
        return root_layout(node)
    return Layout(below.root, g.shape(node), strides, below.offset)


# A dim with several strides: (extent, stride) from the outermost.
Factors = tuple[tuple[Expr, Expr], ...]


@dataclass(frozen=True)
class _Nested:
    """A window whose dims may each have several strides: (batch, seq * 4, 16) of (batch, seq, 64)
    in rows of 128 is ((batch, 128 * seq)), ((seq, 128), (4, 16)), ((16, 1))."""

    root: fx.Node
    dims: tuple[Factors, ...]
    offset: Expr

    @staticmethod
    def of(layout: Layout) -> _Nested:
        pairs = zip(layout.shape, layout.strides, strict=True)
        return _Nested(layout.root, tuple(((n, s),) for n, s in pairs), layout.offset)

    def flat(self) -> Layout | None:
        """Return the layout with one stride per dim, or None if that is not possible."""
        if any(len(factors) > 1 for factors in self.dims):
            return None
        pairs = [factors[0] if factors else (ONE, ZERO) for factors in self.dims]
        shape, strides = tuple(n for n, _ in pairs), tuple(s for _, s in pairs)
        return Layout(self.root, shape, strides, self.offset)


def _nest(node: fx.Node) -> _Nested | None:
    """Return a chain of views as nested strides; None if these cannot express it.

    Nested strides as in CuTe's layouts (NVIDIA CUTLASS 3).
    """
    if not is_view(node) or not g.is_tensor(node):
        return _Nested.of(root_layout(node))
    below = _nest(view_source(node))
    if below is None:
        return None
    if VIEWS[node.target] == "reshape":
        dims = _regroup(tuple(f for factors in below.dims for f in factors), g.shape(node))
        return None if dims is None else _Nested(below.root, dims, below.offset)
    flat = below.flat()
    return _Nested.of(_affine(node, flat)) if flat is not None else _permute(node, below)


def _permute(node: fx.Node, below: _Nested) -> _Nested | None:
    """Apply a view that permutes the dims of `below`; None for any other view."""
    if node.target not in PERMUTATIONS:
        return None
    rank = len(below.dims)
    marks = tuple(dim(f"dim_{d}") for d in range(rank))
    order = input_index(node, marks)
    return _Nested(below.root, tuple(below.dims[order.index(mark)] for mark in marks), below.offset)


@lru_cache(maxsize=65536)
def _regroup(factors: Factors, shape: tuple[Expr, ...]) -> tuple[Factors, ...] | None:
    """Return nested strides of a window reshaped to `shape`; None if that needs a copy."""
    left = _merge(factors)
    dims: list[Factors] = []
    for extent in reversed(shape):
        taken: list[tuple[Expr, Expr]] = []
        rest = extent
        while rest != 1:
            if not left:
                return None
            inner, stride = left.pop()
            more, outer = divide(rest, inner), divide(inner, rest)
            if more is not None:
                taken.append((inner, stride))
                rest = more
            elif outer is not None:
                taken.append((rest, stride))
                left.append((outer, product((stride, rest))))
                rest = ONE
            else:
                return None
        dims.append(tuple(_merge(taken[::-1])) or ((ONE, ZERO),))
    return None if left else tuple(reversed(dims))


def _merge(factors: Sequence[tuple[Expr, Expr]]) -> list[tuple[Expr, Expr]]:
    """Return the factors without extents of 1, with adjacent factors merged where possible."""
    merged: list[tuple[Expr, Expr]] = []
    for extent, stride in factors:
        if extent == 1:
            continue
        if merged and (merged[-1][1] - stride * extent).expand() == 0:
            merged[-1] = (product((merged[-1][0], extent)), stride)
        else:
            merged.append((extent, stride))
    return merged


def _affine(node: fx.Node, below: Layout) -> Layout:
    """Compute a view's strides by evaluating its affine index map at zero and at each unit
    vector."""
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
    """Return the strides of `below` reshaped to `shape`, or None if that needs a copy.

    Merges below's dims where stride[i] == stride[i+1] * size[i+1], then splits them to fit.
    """
    dims = _regroup(tuple(zip(below.shape, below.strides, strict=True)), shape)
    if dims is None or any(len(factors) > 1 for factors in dims):
        return None
    return tuple(factors[0][1] for factors in dims)


def has_plain_rows(layout: Layout) -> bool:
    """Return whether a GEMM can read a window as a matrix: one row stride, adjacent elements."""
    depth = layout.shape[-1]
    flat = reshape_strides(layout, (product(layout.shape[:-1]), depth))
    return flat is not None and (flat[1] == 1 or depth == 1)
