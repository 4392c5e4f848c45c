"""Result layouts: which strides and aliases eager mode gives to results and to inputs of fallback
ops.

In: a captured graph before any pass, with named sizes. Out: the same graph, annotated: the output
node has, per leaf, the input or parameter that it aliases, or its memory and strides; every op that
may read raw memory has the strides of its arguments::

    x * 2, permute(linear, [0, 2, 1])  ->  Fresh("mul", ...), Fresh("linear", strides (.., 1, 384))
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import Max

from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import ONE, ZERO, Expr, product
from turbotx.ir.views import SPLITS, VIEWS
from turbotx.ops import OPS, takes_any_layout

aten = torch.ops.aten

RETURNS = "returns"
"""In the output node's meta: a `Fresh` or an `Alias` per leaf, None for a leaf that is not a
tensor."""
OWN = "own"
"""In a node's meta: the node is a copy for the caller, made by every call."""
ORDER = "order"
"""In an input's meta: the memory order of the caller's dims, None if it is the input's own;
otherwise a `permute` restores the caller's dims."""
ASKED = "layout_asked"
"""In an input's meta: None, or what the model's code queried of its memory layout: False whether it
is dense, True its strides."""
READS = "reads"
"""In the meta of an op that may read raw memory: its tensor arguments' strides, in order."""


@dataclass(frozen=True)
class Fresh:
    """A leaf in memory that a call allocates; leaves with the same `memory` are views of each
    other.

    extents: of the memory, slowest dim first, dense. shape, strides and offset: of the leaf in that
    memory. overlaps: whether elements of the leaf share memory.
    """

    memory: str
    extents: tuple[Expr, ...]
    shape: tuple[Expr, ...]
    strides: tuple[Expr, ...]
    offset: Expr
    overlaps: bool = False

    def apart(self, name: str) -> Fresh:
        """Return the same leaf in dense memory of its own."""
        return Fresh(name, self.shape, self.shape, _dense(self.shape), ZERO)


@dataclass(frozen=True)
class Alias:
    """A leaf that is an input, a parameter, or a view of one.

    steps: the calls that make the view from it, each (op, arguments after the first, keywords),
    with sizes as expressions.
    """

    root: str
    steps: tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...]


Steps = Sequence[tuple[Any, tuple[Any, ...], dict[str, Any]]]
"""Calls, each on the result of the previous one: (op, arguments after the first, keywords)."""


def find_shown(graph: fx.Graph) -> tuple[Steps | None, ...]:
    """Return, for each output leaf that aliases an input or parameter, the model's own ops that
    make it. If the input has another memory order, a reshape among them may be a copy.

    graph: as traced, before decomposition. None for other leaves, and for those that steps on a
    single tensor cannot express.
    """
    leaves: Any = graph.output_node().args[0]
    return tuple(map(_find_steps, leaves))


def _find_steps(leaf: Any) -> Steps | None:
    chain = _chain(leaf) if g.is_tensor(leaf) else []
    if not chain or chain[-1].op not in ("placeholder", "get_attr"):
        return None
    shown = [n for n in chain if g.is_tensor(n)]
    others: list[fx.Node] = []
    fx.node.map_arg([(n.args[1:], n.kwargs) for n in chain[:-1]], others.append)
    if any(map(g.is_tensor, others)) or not all(_share_memory(n, chain[-1]) for n in shown):
        return None
    return _steps(chain)


def note_layouts(graph: fx.Graph, shown: Sequence[Steps | None]) -> None:
    """Annotate a graph's nodes with the layouts that eager mode gives outputs and that raw reads
    need.

    shown: the result of `find_shown` for the graph as traced.
    """
    for node in list(graph.nodes):
        if node.op == "output":
            leaves: Any = node.args[0]
            node.meta[RETURNS] = tuple(map(_returned, leaves, shown))
        if node.op != "call_function":
            continue
        if node.target is aten.as_strided.default:
            _read_from_root(node)
        known = node.target in OPS or node.target in VIEWS or node.target in SPLITS
        if not known and not takes_any_layout(node.target):
            node.meta[READS] = tuple(map(strides_of, tensor_arguments(node)))


def tensor_arguments(node: fx.Node) -> list[fx.Node]:
    """Return an op's tensor arguments in the order in which `map_arg` visits them."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return [n for n in found if g.is_tensor(n)]


def strides_of(node: fx.Node) -> tuple[Expr, ...]:
    """Return the strides that eager mode gives a node's tensor, with sizes of at least one."""
    return tuple(map(_positive, g.strides(node)))


def are_equal_strides(shape: Sequence[Expr], a: Sequence[Expr], b: Sequence[Expr]) -> bool:
    """Return whether two lists of strides are equivalent; the stride of an extent of 1 is
    ignored."""
    pairs = zip(shape, a, b, strict=True)
    return all(extent == 1 or (s - t).expand() == 0 for extent, s, t in pairs)


def order_of(shape: Sequence[Expr], strides: Sequence[Expr]) -> list[int] | None:
    """Return the dims of dense memory from slowest to fastest, None if it is not dense.

    (batch, heads, seq, 64) with strides (768*seq, 64, 768, 1) and 12 heads gives [0, 2, 1, 3].
    """
    left, order, step = list(range(len(shape))), list[int](), ONE
    while left:
        ones = [d for d in left if shape[d] == 1]
        fits = ones[-1:] or [d for d in left if (strides[d] - step).expand() == 0][-1:]
        if not fits:
            return None
        left.remove(fits[0])
        order.insert(0, fits[0])
        step = product((step, shape[fits[0]]))
    # Extents of 1 fit anywhere: prefer the order of the dims.
    longer = [d for d in order if shape[d] != 1]
    return sorted(order) if longer == sorted(longer) else order


def _positive(value: Expr) -> Expr:
    """Count sizes in strides as at least one, as the tracer does: max(1, seq) becomes seq."""

    def larger(*args: Expr) -> Expr:
        rest = [a for a in args if a != 1]
        return rest[0] if len(rest) == 1 and len(args) == 2 else sympy.Max(*args)

    return value.replace(Max, larger).replace(sympy.Max, larger).expand()


# --- views ---

_COPIES = frozenset(
    {
        aten.reshape.default, aten.flatten.using_ints, aten.contiguous.default,
        aten.ravel.default,
    }
)  # fmt: skip
"""Ops whose result is a view or a copy, depending on the input's strides."""


def owner_of(node: fx.Node) -> fx.Node | None:
    """Return the tensor whose memory a call's result shares; None if it allocates its own."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.target is g.GETITEM:
        source = node.args[0]
        return source if owner_of(source) is not None else None
    if node.target in (aten._unsafe_view.default, aten.detach_.default):
        return node.args[0]
    schema = getattr(node.target, "_schema", None)
    first = schema.arguments[0] if schema is not None and schema.arguments else None
    if first is None or first.alias_info is None or first.alias_info.is_write:
        return None
    if node.target in _COPIES and not _share_memory(node, node.args[0]):
        return None
    return node.args[0]


def _share_memory(a: fx.Node, b: fx.Node) -> bool:
    if not (g.is_tensor(a) and g.is_tensor(b)):
        return False
    return a.meta["val"].untyped_storage()._cdata == b.meta["val"].untyped_storage()._cdata


def _chain(node: fx.Node) -> list[fx.Node]:
    """Return a node and the chain of tensors that it is a view of, down to the one that owns the
    memory."""
    found = [node]
    while (source := owner_of(found[-1])) is not None:
        found.append(source)
    return found


def _steps(chain: Sequence[fx.Node]) -> Steps:
    """Return the calls that lead from the last node of a chain to its first."""
    return [(n.target, n.args[1:], n.kwargs) for n in reversed(chain[:-1])]


def _returned(leaf: Any, shown: Steps | None) -> Fresh | Alias | None:
    if not g.is_tensor(leaf):
        return None
    chain = _chain(leaf)
    if chain[-1].op in ("placeholder", "get_attr"):
        steps = list(_steps(chain) if shown is None else shown)
        moved = chain[-1].meta.get(ORDER) is not None and bool(steps)
        if moved and steps[0][0] is aten.permute.default:
            steps.pop(0)  # the permute that restores the caller's dims; raw reads skip it
        convert = [
            (t, *fx.node.map_arg((tuple(args), dict(kwargs)), g.size)) for t, args, kwargs in steps
        ]
        return Alias(chain[-1].name, tuple((t, tuple(a), dict(k)) for t, a, k in convert))
    kind = g.dtype(leaf)
    for k, node in enumerate(chain):
        # Strides of another dtype count differently, and such a window is a copy here.
        raw = node.target is aten.as_strided.default
        if raw or (g.is_tensor(node) and g.dtype(node) != kind):
            chain = chain[: max(k, 1)]
            break
    while not g.is_tensor(chain[-1]):
        chain.pop()
    root, shape, strides = chain[-1], g.shape(leaf), strides_of(leaf)
    order = order_of(g.shape(root), strides_of(root))
    if order is None or root.target is aten.as_strided.default:
        return Fresh(leaf.name, shape, shape, strides, ZERO).apart(leaf.name)
    extents = tuple(g.shape(root)[d] for d in order)
    value = g.tensor(leaf)
    offset = ZERO if root is leaf else _positive(g.size(value.storage_offset()))
    overlaps = any(n.target is aten.unfold.default for n in chain)
    return Fresh(root.name, extents, shape, strides, offset, overlaps)


def _dense(shape: Sequence[Expr]) -> tuple[Expr, ...]:
    return tuple(product(shape[d + 1 :]) for d in range(len(shape)))


# --- as_strided ---


def _read_from_root(node: fx.Node) -> None:
    """Apply `as_strided` to the tensor that owns the memory instead of to a view of it, since it
    ignores the view."""
    kind = g.dtype(node)
    chain = [n for n in _chain(node) if g.is_tensor(n)]
    same = itertools.takewhile(lambda n: g.dtype(n) == kind, chain)
    root = list(same)[-1]
    if root is not node:
        node.args = (root, *node.args[1:])
