"""Diagonals: computes a bias that tells distances of key and query once a distance.

In: attention whose bias is made of `k - q` by pointwise ops and lookups. Out: the same with a bias
over the diagonals, (heads, 1, q + k - 1) instead of (heads, q, k), which kernels read by strides;
one that tells neither key nor query is one number a head::

    embedding(table, bucket(arange(k)[None] - arange(q)[:, None]))
      ->  along_diagonals(embedding(table, bucket(arange(1 - q, k)[None] - 0)), q, k)

What f(q, k) is known to be a function of k - q is f(0, k - q): the positions of queries are
replaced by the first of them, those of keys by one a diagonal, and all else stays.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.attention_ops import along_diagonals, attention
from turbotx.ir.expr import ONE, Expr, dim, is_nonnegative
from turbotx.ir.views import VIEWS, input_index, is_view
from turbotx.ops import OPS
from turbotx.passes.known_values import find_number

aten = torch.ops.aten

Kind = tuple[int, int] | str
"""How an element tells places: (a, b) for the integer a * q + b * k + what tells neither, so that
(0, 0) tells neither and (-1, 1) the distance; or DISTANCE for any other function of k - q."""
FIXED: Kind = (0, 0)
DISTANCE: Kind = "distance"
Places = tuple[int | None, int | None]
"""The dims of a tensor along which queries and keys lie, None where it has none or one of size
1."""

_FILLED: dict[Any, int] = {
    aten.full.default: 0, aten.zeros.default: 0, aten.ones.default: 0, aten.new_full.default: 1,
    aten.new_zeros.default: 1, aten.new_ones.default: 1,
}  # fmt: skip
"""Ops that make equal elements, with the index of their shape argument."""
_LIKES = frozenset((aten.full_like.default, aten.zeros_like.default, aten.ones_like.default))
_SQUEEZES = frozenset((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims))


def use_diagonals(graph: fx.Graph) -> None:
    """Rewrite the biases of attention that tell no more of key and query than their distance."""
    found: dict[tuple[Expr, Expr], _Diagonals] = {}
    for node in graph.find_nodes(op="call_function", target=attention):
        bias = g.optional(node, 4)
        if bias is None or len(g.shape(bias)) < 2:
            continue
        sizes = g.shape(bias)[-2:]
        # A size of 0 is a number; any other that is not known is at least 1.
        if ONE in sizes or not all(is_nonnegative(n - 1) for n in sizes):
            continue
        with graph.inserting_before(node):
            made = found.setdefault(sizes, _Diagonals(*sizes)).rewritten(bias)
        if made is not None:
            adds = g.dtype(made) is torch.bool or find_number(made, {}) != 0  # T5's cross attention
            node.args = (*node.args[:4], made if adds else None, *node.args[5:])


class _Unknown(Exception):
    """A node that is not known to be a function of the distance, or not over the diagonals."""


class _Diagonals:
    """Reads and rewrites tensors of one number of queries and of keys."""

    def __init__(self, queries: Expr, keys: Expr) -> None:
        self.sizes = (queries, keys)
        self._kinds: dict[tuple[fx.Node, Places], Kind] = {}
        self._lines: dict[tuple[fx.Node, Places], fx.Node] = {}
        self._counts: list[fx.Node | None] = [None, None]  # an arange over queries, and over keys

    def rewritten(self, bias: fx.Node) -> fx.Node | None:
        """Return a tensor that broadcasts to the same, and holds an element a distance or one for
        all; None if there are more."""
        rank = len(g.shape(bias))
        try:
            kind = self._kind(bias, rank - 2, rank - 1)
            if not _is_by_distance(kind):
                return None
            line = self._line(bias, rank - 2, rank - 1)
            while g.is_call(line, aten.expand.default) and _is_alike(line.args[0], line):
                line = line.args[0]  # attention repeats it for every text itself
            if g.shape(line)[-1] == 1:
                return line
            lengths = [self._length(count) for count in self._counts]
        except _Unknown:
            return None
        made = g.emit(bias, along_diagonals, line, *lengths)
        return made if g.shape(made)[-2:] == self.sizes else None

    # --- which places an element tells ---

    def _kind(self, node: Any, q: int | None, k: int | None) -> Kind:
        """Return how elements of a node tell places, given the dims of these. Raises _Unknown."""
        if not g.is_tensor(node):
            return FIXED
        q, k = places = self._places(node, q, k)
        if q is None and k is None:
            return FIXED
        if (node, places) not in self._kinds:
            self._kinds[node, places] = self._find_kind(node, q, k)
        return self._kinds[node, places]

    def _places(self, node: fx.Node, q: int | None, k: int | None) -> Places:
        """Return the dims of places without those of size 1. Raises _Unknown for other sizes than
        the numbers of queries and keys."""
        found: list[int | None] = []
        for d, size in zip((q, k), self.sizes, strict=True):
            given = None if d is None or d < 0 else g.shape(node)[d]
            if given not in (None, ONE, size):
                raise _Unknown
            found.append(None if given in (None, ONE) else d)
        return found[0], found[1]

    def _find_kind(self, node: fx.Node, q: int | None, k: int | None) -> Kind:
        if node.op != "call_function" or g.is_random(node):
            raise _Unknown
        if node.target is aten.arange.start_step:
            whole = not g.dtype(node).is_floating_point and g.argument(node, "step", 1) == 1
            if not whole or not all(_is_whole(a) for a in node.args):
                raise _Unknown
            self._counts[q is None] = node
            return (1, 0) if k is None else (0, 1)
        if node.target in _FILLED:
            return FIXED
        kinds = [self._kind(x, *places) for x, places in self._sources(node, q, k)]
        if node.target in _LIKES:
            return FIXED
        affine = _affine(node, kinds)
        if affine is not None:
            return affine
        if not all(map(_is_by_distance, kinds)):
            raise _Unknown
        return FIXED if all(kind == FIXED for kind in kinds) else DISTANCE

    def _sources(
        self, node: fx.Node, q: int | None, k: int | None
    ) -> Iterator[tuple[fx.Node, Places]]:
        """Yield the tensors that a node reads along places, with the dims of these in them, in the
        order of its arguments. Raises _Unknown for an op that is neither pointwise, a view nor a
        lookup."""
        row, rank = OPS.get(node.target), len(g.shape(node))
        if node.target in _LIKES or (row is not None and row.kind == "pointwise"):
            tensors: list[Any] = [x for x in node.args if g.is_tensor(x)]
            if not set(filter(g.is_tensor, node.all_input_nodes)) <= set(tensors):
                raise _Unknown
            for x in tensors:
                yield x, _inside(q, k, rank - len(g.shape(x)))
        elif is_view(node) and VIEWS[node.target] == "affine" and node.target is not g.GETITEM:
            yield g.operand(node, 0), self._viewed(node, q, k)
        elif node.target is aten.embedding.default:
            yield g.operand(node, 1), _inside(q, k, 0, rank - 1)
        elif node.target is aten.index.Tensor:
            listed: Any = node.args[1]
            given = [(d, at) for d, at in enumerate(listed) if at is not None]
            first, index = given[0]
            if len(given) > 1 or not _is_whole(index):
                raise _Unknown
            yield index, _inside(q, k, first, first + len(g.shape(index)))
        else:
            raise _Unknown

    def _viewed(self, node: fx.Node, q: int | None, k: int | None) -> Places:
        """Return the dims of places in what a view is of, each of which it shows as it is."""
        source, rank = g.shape(g.operand(node, 0)), len(g.shape(node))
        marks = tuple(dim(f"place_{d}") for d in range(rank))
        inner = input_index(node, marks)
        found: list[int | None] = []
        for d in (q, k):
            at = [] if d is None else [s for s, i in enumerate(inner) if i.has(marks[d])]
            if len(at) > 1 or any(inner[s] not in marks for s in at):
                raise _Unknown
            found.append(at[0] if at else None)
        if node.target in _SQUEEZES:
            given: Any = node.args[1] if len(node.args) > 1 else range(len(source))
            dims = [given] if isinstance(given, int) else given
            if {d % len(source) for d in dims} & set(found):
                raise _Unknown  # without effect on many places, it would remove a single one
        return found[0], found[1]

    # --- over the diagonals ---

    def _line(self, node: Any, q: int | None, k: int | None) -> Any:
        """Return a node with one query, the first, and one key a diagonal, or one if it tells no
        place. Raises _Unknown if its op cannot be called so."""
        if not g.is_tensor(node):
            return node
        q, k = places = self._places(node, q, k)
        if q is None and k is None:
            return node
        if (node, places) not in self._lines:
            made = self._make_line(node, q, k)
            self._check(node, made, q, k)
            self._lines[node, places] = made
        return self._lines[node, places]

    def _make_line(self, node: fx.Node, q: int | None, k: int | None) -> fx.Node:
        target: Any = node.target
        if target is aten.arange.start_step:
            first = (aten.slice.Tensor, node, 0, 0, 1)
            return self._count(node) if q is None else g.emit(node, *first)
        args: list[Any] = list(node.args)
        if target in _FILLED:
            at = _FILLED[target]
            args[at] = [1 if d in (q, k) else n for d, n in enumerate(args[at])]
        else:
            lines = {x: self._line(x, *places) for x, places in self._sources(node, q, k)}
            args = list(fx.node.map_arg(args, lambda n: lines.get(n, n)))
        if target is aten.expand.default:
            inner = g.shape(args[0])
            _, along = _inside(None, k, len(g.shape(node)) - len(inner))
            wanted = {q: 1, k: 1 if along is None or inner[along] == 1 else -1}
            args[1] = [wanted.get(d, n) for d, n in enumerate(args[1])]
        return g.emit(node, target, *args, **node.kwargs)

    def _count(self, node: fx.Node) -> fx.Node:
        """Return the positions of keys, and before them as many as there are queries but one."""
        start, end = _ends(node)
        less = _number(node, operator.sub, self._length(self._counts[0]), 1)
        first = _number(node, operator.sub, start, less)
        return g.emit(node, aten.arange.start_step, first, end, 1, **node.kwargs)

    def _length(self, count: fx.Node | None) -> Any:
        if count is None:
            raise _Unknown
        start, end = _ends(count)
        return _number(count, operator.sub, end, start)

    def _check(self, node: fx.Node, made: fx.Node, q: int | None, k: int | None) -> None:
        """Raise _Unknown unless a line has the sizes and the dtype that it is to have."""
        diagonals = (self.sizes[0] + self.sizes[1] - 1).expand()
        allowed = [
            (ONE,) if d == q else (ONE, diagonals) if d == k else (size,)
            for d, size in enumerate(g.shape(node))
        ]
        sizes = g.shape(made)
        is_line = len(sizes) == len(allowed) and all(map(tuple.__contains__, allowed, sizes))
        if not is_line or g.dtype(made) is not g.dtype(node):
            raise _Unknown


def _is_alike(one: Any, other: fx.Node) -> bool:
    """Return whether a tensor has the other's rows and columns."""
    return len(g.shape(one)) > 1 and g.shape(one)[-2:] == g.shape(other)[-2:]


def _is_by_distance(kind: Kind) -> bool:
    """Return whether elements of a kind tell no more of places than their distance."""
    return isinstance(kind, str) or sum(kind) == 0


def _affine(node: fx.Node, kinds: list[Kind]) -> Kind | None:
    """Return the kind of an integer sum of places, or of a view of one; None for other nodes.

    Floats are no such sums: their rounding differs by place.
    """
    if not _is_whole(node) or not all(isinstance(kind, tuple) for kind in kinds):
        return None
    ends, sums = iter(kinds), (aten.add.Tensor, aten.sub.Tensor)
    if is_view(node) or node.target is aten._to_copy.default:
        return kinds[0] if _is_whole(node.args[0]) else None
    if node.target not in sums or node.kwargs or not all(map(_is_whole, node.args)):
        return None
    one, other = (next(ends) if g.is_tensor(x) else FIXED for x in node.args)
    sign = 1 if node.target is aten.add.Tensor else -1
    return int(one[0]) + sign * int(other[0]), int(one[1]) + sign * int(other[1])


def _is_whole(value: Any) -> bool:
    """Return whether a value is an integer, or a tensor of them."""
    if g.is_tensor(value):
        return not g.dtype(value).is_floating_point and g.dtype(value) is not torch.bool
    return isinstance(g.fake(value), (int, torch.SymInt)) and not isinstance(value, bool)


def _inside(q: int | None, k: int | None, begin: int, end: int | None = None) -> Places:
    """Return dims of a result as those of an operand that is its dims from `begin` on, below 0
    where its dims are broadcast. Raises _Unknown for a dim from `end` on, or before a lookup's."""
    if end is not None and any(d is not None and not begin <= d < end for d in (q, k)):
        raise _Unknown
    found = [None if d is None or d < begin else d - begin for d in (q, k)]
    return found[0], found[1]


def _ends(count: fx.Node) -> tuple[Any, Any]:
    """Return the first position of an arange, and the one behind its last."""
    return g.argument(count, "start"), g.argument(count, "end")


def _number(like: fx.Node, compute: Callable[[Any, Any], Any], one: Any, other: Any) -> Any:
    """Return a number made of two: itself, or a node that computes it from sizes."""
    value = compute(g.fake(one), g.fake(other))
    if not isinstance(one, fx.Node) and not isinstance(other, fx.Node):
        return value
    node = like.graph.call_function(compute, (one, other))
    node.meta["val"] = value
    return node
