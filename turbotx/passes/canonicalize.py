"""Canonicalize: removes ops without effect and rewrites equivalent forms to one.

In: the captured ATen graph. Out: the same graph without assertions, dropout, no-op copies and
casts, redundant views, common subexpressions and dead code, for example::

    clone(dropout(layer_norm))  ->  layer_norm
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import ZERO
from turbotx.ir.views import VIEWS
from turbotx.passes.operands import RESHAPES

aten = torch.ops.aten

_ASSERTIONS = {
    aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.msg,
    aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default,
}  # fmt: skip
_IDENTITIES = {
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default,
    aten.detach_.default, aten.lift_fresh_copy.default, aten.lift_fresh.default,
}  # fmt: skip
_DROPOUTS = {aten.dropout.default, aten.alpha_dropout.default}
_ARITHMETIC = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default,
    aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default,
}  # fmt: skip
_COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor, aten.bitwise_and.Tensor, aten.maximum.default}
_CONVERSIONS = {
    aten._to_copy.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout,
    aten.type_as.default,
}  # fmt: skip


def canonicalize(graph: fx.Graph) -> None:
    """Rewrite `graph` in place to a fixed point; a second run changes nothing."""
    for node in list(graph.nodes):
        if node.target in _ASSERTIONS:
            graph.erase_node(node)
    changed = True
    while changed:
        changed = False
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            _drop_empty(node)
            same = _same_as(node) or _as_number(node)
            if same is not None:
                node.replace_all_uses_with(same)
                graph.erase_node(node)
                changed = True
        changed |= merge_duplicates(graph)
        changed |= _drop_dead(graph)


def _drop_empty(node: fx.Node) -> None:
    """Remove empty tensors from a concatenation (a cache before its first token), if the rest
    determines the dtype."""
    if not g.is_call(node, aten.cat.default):
        return
    parts: Any = node.args[0]
    kept = [x for x in parts if ZERO not in g.shape(x)]
    if kept and len(kept) < len(parts) and any(g.dtype(x) == g.dtype(node) for x in kept):
        node.args = (kept, *node.args[1:])


def _as_number(node: fx.Node) -> fx.Node | None:
    """Fold arithmetic on constant 0-d tensors, such as sqrt(torch.tensor(3) * 2), to one such
    tensor."""
    sources = node.all_input_nodes
    if node.target not in _ARITHMETIC or not sources or g.shape(node) or node.kwargs:
        return None
    made = [n.args[0] for n in sources if g.is_call(n, aten.scalar_tensor.default)]
    if len(made) < len(sources) or not all(isinstance(x, (int, float)) for x in made):
        return None
    compute: Any = node.target
    number = compute(*fx.node.map_arg(node.args, _value))
    with node.graph.inserting_before(node):
        kwargs = {"dtype": number.dtype, "device": number.device}
        new = node.graph.call_function(aten.scalar_tensor.default, (number.item(),), kwargs)
    new.meta = dict(node.meta)
    return new


def _value(node: fx.Node) -> Any:
    made: Any = node.target
    return made(*node.args, **node.kwargs)


def _same_as(node: fx.Node) -> fx.Node | None:
    """Return a node that always equals this one, or None."""
    if g.is_call(node, aten.cat.default):
        listed: Any = node.args[0]
        return listed[0] if len(listed) == 1 else None
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    if node.target in _IDENTITIES or (node.target in _DROPOUTS and not g.is_random(node)):
        return source
    if not (g.is_tensor(node) and g.is_tensor(source)):
        return None
    if node.target in _CONVERSIONS:
        same = g.dtype(node) == g.dtype(source) and g.tensor(node).device == g.tensor(source).device
        return source if same else None
    if g.shape(node) != g.shape(source):
        return _merge_views(node, source)
    rule = _NO_OPS.get(node.target)
    if rule is not None and rule(node) and g.dtype(node) == g.dtype(source):
        return source
    return _merge_views(node, source)


def _is_number(value: Any, number: int) -> bool:
    return type(value) in (int, float) and bool(value == number)


def _keeps_order(node: fx.Node) -> bool:
    order: Any = node.args[1]
    return [d % len(order) for d in order] == list(range(len(order)))


def _whole_slice(node: fx.Node) -> bool:
    start, step = g.argument(node, "start"), g.argument(node, "step")
    return start in (None, 0) and step == 1


def _adds_nothing(node: fx.Node) -> bool:
    """Return whether an addition is a no-op: x + 0 for integers; for floats x + -0.0 and x - 0.0,
    since -0.0 + 0.0 is 0.0."""
    if g.argument(node, "alpha") != 1 or not _is_number(node.args[1], 0):
        return False
    number: Any = node.args[1]
    negative = math.copysign(1.0, number) < 0
    exact = not (g.dtype(node).is_floating_point or g.dtype(node).is_complex)
    return exact or negative == (node.target is aten.add.Tensor)


def _multiplies_by_one(node: fx.Node) -> bool:
    return _is_number(node.args[1], 1) and not node.kwargs


# Ops that are no-ops if their shape equals the input's (and the rule agrees).
_NO_OPS: dict[Any, Callable[[fx.Node], bool]] = {
    aten.permute.default: _keeps_order,
    **dict.fromkeys((*RESHAPES, aten.expand.default), lambda node: True),
    aten.slice.Tensor: _whole_slice,
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _adds_nothing),
    **dict.fromkeys((aten.mul.Tensor, aten.div.Tensor), _multiplies_by_one),
}
_OF_ONES = {
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
}  # fmt: skip


def _merge_views(node: fx.Node, source: fx.Node) -> fx.Node | None:
    """Fold view-of-view: two reshapes become one, two permutations become one (or none)."""
    if node.target in RESHAPES and (
        VIEWS.get(source.target) == "reshape"
        or source.target in _OF_ONES
        or moves_only_ones(source)
    ):
        inner = source.args[0]
        assert isinstance(inner, fx.Node)
        if g.shape(inner) == g.shape(node):
            return inner
        node.replace_input_with(source, inner)
    elif node.target is aten.permute.default and source.target is aten.permute.default:
        first, second = g.argument(source, "dims"), g.argument(node, "dims")
        order, inner = [first[d] for d in second], g.operand(source, 0)
        if order == list(range(len(order))):
            return inner
        node.args = (inner, order)
    elif node.target is aten.permute.default and source.target is aten.unsqueeze.default:
        return _permute_first(node, source)
    return None


def moves_only_ones(node: fx.Node) -> bool:
    """Return whether a permutation keeps the order of all dims larger than 1."""
    if not g.is_call(node, aten.permute.default):
        return False
    source, order = cast(Any, node.args)
    shape = g.shape(source)
    longer = [d % len(shape) for d in order if shape[d] != 1]
    return longer == sorted(longer)


def _permute_first(node: fx.Node, source: fx.Node) -> fx.Node:
    """Move a permutation before the insertion of a dim of size 1, so that reshapes only see what
    they merge.

    einsum inserts such dims and permutes them along with the others.
    """
    inner, place = cast(Any, source.args)
    rank = len(g.shape(node))
    added = place % rank
    order = [d % rank for d in cast(Any, node.args[1])]
    rest = [d - (d > added) for d in order if d != added]
    with node.graph.inserting_before(node):
        turned = g.emit(node, aten.permute.default, inner, rest)
        return g.emit(node, aten.unsqueeze.default, turned, order.index(added))


def _key(node: fx.Node) -> Any | None:
    """Return the CSE key of a call; None for calls with effects."""
    if node.op == "get_attr":
        return ("get_attr", node.target)
    if node.op != "call_function" or _has_effect(node):
        return None

    args = g.freeze(node.args, lambda n: n)
    if node.target in _COMMUTATIVE and not node.kwargs and g.is_tensor(args[1]):
        args = tuple(sorted(args, key=lambda n: n.name))  # commutative: a + b is b + a
    return (node.target, args, g.freeze(node.kwargs, lambda n: n))


def _has_effect(node: fx.Node) -> bool:
    """Return whether a call does more than compute its result: it mutates a tensor, or draws random
    numbers, which later draws depend on."""
    schema = getattr(node.target, "_schema", None)
    return g.is_random(node) or (schema is not None and schema.is_mutable)


def merge_duplicates(graph: fx.Graph) -> bool:
    """Merge equal calls with equal arguments; return whether there were any."""
    seen: dict[Any, fx.Node] = {}
    changed = False
    for node in list(graph.nodes):
        key = _key(node)
        if key is None:
            continue
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            changed = True
    return changed


def _drop_dead(graph: fx.Graph) -> bool:
    """Erase what nothing reads; return whether there was any."""
    changed = False
    for node in reversed(graph.nodes):
        if not node.users and not _stays(node):
            graph.erase_node(node)
            changed = True
    return changed


def _stays(node: fx.Node) -> bool:
    """Return whether a node is kept even if it has no users."""
    return node.op in ("output", "placeholder") or _has_effect(node)
