"""In-place ops: replaces them in a traced graph by the ops that return a new tensor.

In: an exported graph, before decomposition. Out: the same graph, in which an in-place op on a
tensor that only the graph holds, or on a view of one, is its out-of-place variant::

    y = mul(x, 2); add_(y, 1); relu(y)  ->  y = mul(x, 2); z = add(y, 1); relu(z)
    v = slice(y, 1, 2, 4); fill_(v, 0)  ->  z = slice_scatter(y, fill(v, 0), 1, 2, 4)

Views that are used afterwards are taken again, from the new tensor. Other in-place ops stay: they
are decomposed by a trace of the whole, which takes as long as the first trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload

from turbotx.capture.casts import inside
from turbotx.errors import CaptureError
from turbotx.ir.expr import Expr, expr
from turbotx.ir.fx_nodes import GETITEM, fake, is_random, is_tensor, meta_without_value, place_of
from turbotx.ir.strides import contiguous_strides

aten = torch.ops.aten
_NEW = frozenset(("aten.linear.default", "aten.matmul.default", "aten.layer_norm.default",
                  "aten.softmax.int", "aten.conv1d.default", "aten.conv2d.default"))  # fmt: skip
"""Composite ops whose result never aliases their argument; that of others (dropout) may."""

_WRITE_BACK: dict[Any, Callable[..., fx.Node]] = {
    aten.alias.default: lambda call, base, new: new,
    aten.detach.default: lambda call, base, new: new,
    aten.slice.Tensor: lambda call, *args: call(aten.slice_scatter.default, *args),
    aten.select.int: lambda call, *args: call(aten.select_scatter.default, *args),
    aten.unsqueeze.default: lambda call, base, new, dim: call(aten.squeeze.dim, new, dim),
    aten.transpose.int: lambda call, base, new, *dims: call(aten.transpose.int, new, *dims),
    aten.view.default: lambda call, base, new, size: call(aten.reshape_as.default, new, base),
}
"""What gives a tensor with a view's new value: calls with the tensor, that value, and the view's
other arguments."""


def write_out_of_place(graph: fx.Graph) -> None:
    """Replace in-place ops by their out-of-place variants where nothing else observes the change:
    no input, no parameter, and no earlier result that may be a view or a copy.

    Raises CaptureError for a call that draws into a tensor that is not dense.
    """
    place = {node: k for k, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if is_random(node):
            _refuse_strided(node)
        op = find_out_of_place(node.target)
        views = _find_views(node.args[0]) if op is not None else []
        if op is None or not views:
            continue
        write = _Write(node, place)
        if any(x.alias_info is not None for x in op._schema.returns):
            node.target = op  # unsqueeze_ and the like change no element
            write.use_later(views[-1], node)
        elif node.target is aten.copy_.default and _is_same(views, _find_views(node.args[1])):
            write.use_later(node, views[-1])  # v += 1 as Python runs it on an item
            graph.erase_node(node)
        else:
            write.replace(op, views)


class _Write:
    """One in-place op. place: where each node stands; new nodes stand where the op does."""

    def __init__(self, node: fx.Node, place: dict[fx.Node, int]) -> None:
        self.node, self.place, self.at = node, place, place[node]
        self.made: list[fx.Node] = []

    def replace(self, op: OpOverload, views: list[fx.Node]) -> None:
        """Replace the op by `op`. views: a new tensor, a view of it, a view of that, and so on to
        the one that the op changes."""
        node, base, changed = self.node, views[0], views[-1]
        stale, before = self._find_stale(base), changed.meta["val"]
        value, known = _compute(op, node.args, node.kwargs), node.meta["val"]
        if stale is None or list(map(expr, value.shape)) != list(map(expr, before.shape)):
            return
        new, node.meta["val"] = node, value
        if value.dtype != before.dtype:
            new = self._call(aten._to_copy.default, new, dtype=before.dtype)
        for view in reversed(views[1:]):
            new = _WRITE_BACK[view.target](self._call, view.args[0], new, *view.args[1:])
        if _layout(new) != _layout(base):
            new = self._call(aten.copy.default, base, new)  # as index_copy, which makes it dense
        if new is node:
            node.meta["val"] = known  # the layout is that of the changed tensor
        elif _layout(new) != _layout(base):
            node.meta["val"] = known
            self._erase_unused()
            return
        node.target = op
        renewed = {base: new}
        for view in (*stale, *views[1:]):
            self._renew(view, renewed)
        for old, now in ((node, renewed[changed]), *renewed.items()):
            self.use_later(old, now)
        self._erase_unused()

    def use_later(self, old: fx.Node, new: fx.Node) -> None:
        """Replace a node where it is used after the op."""
        old.replace_all_uses_with(new, lambda user: self.place[user] > self.at)

    def _find_stale(self, base: fx.Node) -> list[fx.Node] | None:
        """Return the earlier views that are used later; None if one of those may be a copy."""
        views, aliases, stale = {base}, [base], []
        for alias in aliases:  # grows
            for user in alias.users:
                if self.place[user] >= self.at or user in aliases or _makes_new(user):
                    continue
                aliases.append(user)
                if alias in views and _is_view(user):
                    views.add(user)
                if any(self.place[n] > self.at for n in user.users):
                    stale.append(user)
        return stale if views.issuperset(stale) else None

    def _renew(self, view: Any, renewed: dict[fx.Node, fx.Node]) -> fx.Node:
        """Return the same view of the new tensor."""
        if view not in renewed:
            source = self._renew(view.args[0], renewed)
            renewed[view] = self._call(view.target, source, *view.args[1:])
        return renewed[view]

    def _call(self, op: OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call behind the op and what was made for it."""
        with self.node.graph.inserting_after((self.node, *self.made)[-1]):
            made = self.node.graph.call_function(op, args, kwargs)
        made.meta = meta_without_value(self.node)
        made.meta["val"] = _compute(op, args, kwargs)
        self.place[made] = self.at
        self.made.append(made)
        return made

    def _erase_unused(self) -> None:
        for made in reversed(self.made):
            if not made.users:
                self.node.graph.erase_node(made)


def _find_views(changed: Any) -> list[fx.Node]:
    """Return a new tensor and the views of it, each of the one before, that end with `changed`;
    empty if it may belong to something else."""
    views = [changed]
    while _is_view(views[0]):
        views.insert(0, views[0].args[0])
    found = _makes_new(views[0]) and hasattr(views[0].meta["val"], "fake_mode")
    return views if found else []


def _is_same(a: list[fx.Node], b: list[fx.Node]) -> bool:
    """Return whether two results of `_find_views` end with the same part of the same tensor."""
    kinds = [[(v.target, v.args[1:]) for v in views[1:]] for views in (a, b)]
    return a[:1] == b[:1] and kinds[0] == kinds[1]


def _refuse_strided(node: fx.Node) -> None:
    """Raise CaptureError for an op that draws in place into a tensor that is not dense: which
    numbers eager mode draws depends on how it lies in memory, and here it is dense."""
    target: Any = node.target
    drawn: Any = node.args[0]
    if not target._schema.is_mutable or not is_tensor(drawn):
        return
    layout, rank = _layout(drawn), drawn.meta["val"].dim()
    dense = contiguous_strides(layout[:rank])
    if any(want not in (0, stride) for stride, want in zip(layout[rank:], dense, strict=True)):
        at = f" at {place}" if (place := place_of(node)) else ""
        raise CaptureError(
            f"{target} draws into a tensor that is not dense{at}, and its numbers depend on "
            "how that lies in memory: draw into a new tensor, and copy it there"
        )


def _is_view(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in _WRITE_BACK and not node.kwargs


def _layout(node: fx.Node) -> list[Expr]:
    value = node.meta["val"]
    return list(map(expr, (*value.shape, *value.stride())))


def find_out_of_place(target: Any) -> OpOverload | None:
    """Return the out-of-place variant of an in-place op; None for other ops."""
    if not isinstance(target, OpOverload):
        return None
    name, changes = target._opname, [a for a in target._schema.arguments if a.is_write]
    in_place = name.endswith("_") and not name.endswith("__") and target.namespace == "aten"
    if not in_place or len(changes) != 1:
        return None
    other = "normal_functional" if name == "normal_" else name[:-1]
    found = getattr(getattr(aten, other, None), target._overloadname, None)
    draws = torch.Tag.nondeterministic_seeded in target.tags
    # uniform draws what uniform_ does; dropout is several ops.
    return None if draws and found is not None and found._can_decompose() else found


def _makes_new(node: Any) -> bool:
    """Return whether a call's results are new tensors, or not tensors."""
    if isinstance(node, fx.Node) and node.target is GETITEM:
        node = node.args[0]
    if not isinstance(node, fx.Node) or not isinstance(node.target, OpOverload):
        return False
    op = node.target
    if op._opname == "to" and op.namespace == "aten":  # a copy where the dtype changes
        source: Any = node.args[0]
        return bool(node.meta["val"].dtype != source.meta["val"].dtype)
    shared = [a for a in (*op._schema.arguments, *op._schema.returns) if a.alias_info is not None]
    if shared or "unsafe" in op._opname:
        return False
    if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list, torch.SymInt, int)):
        return False
    if op is aten.einsum.default:  # of one operand it is a view
        operands: Any = node.args[1]
        return len(operands) > 1
    return str(op) in _NEW or not op._can_decompose()


def _compute(op: OpOverload, args: Any, kwargs: Any) -> Any:
    args, kwargs = fake((args, kwargs))
    with torch.no_grad(), enable_python_dispatcher(), args[0].fake_mode, inside(op):
        return op(*args, **kwargs)
