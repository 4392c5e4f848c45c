"""Chains: recognises attention written out as matmul, scale, mask, softmax, matmul.

In: the last product of such a chain. Out: its `AttentionPattern`: q, k and v with heads before
rows, and the ops on the scores as scale, softcap, bias and mask, for example::

    softmax(where(ok, tanh(q @ k.mT / 32) * 8 + bias, -inf)) @ v
      ->  scale=0.25, softcap=8, bias=bias, mask=ok, blind_nan

Scores may have one more column for sinks, without a value. They may be reshaped between (batch,
windows, heads, q, k) and (batch * windows * heads, q, k), and converted between dtypes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.passes.heads import Heads, plain_source
from turbotx.passes.operands import number_in
from turbotx.passes.scores import AttentionPattern, Step, read_steps, with_sinks, without_factors

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default)
SOFTMAXES = (aten.softmax.int, aten._softmax.default)
# A fill this low, or the most negative value of its dtype, leaves a key no weight beside any other:
# if a real score were as low, float32 could not distinguish scores.
HIDING = -1e9


def read_chain(node: fx.Node) -> AttentionPattern | None:
    """Return the attention that ends in the product `node`, found by walking back through softmax,
    masks and scale to the first product; None if there is none.

    Emits views of operands and masks before `node`.
    """
    v: Any = node.args[1]
    x: Any = node.args[0]
    ranked: list[fx.Node] = []
    sunk, sinks = False, None
    while not g.is_call(x, *SOFTMAXES):
        sunk = sunk or is_all_but_last(x)
        inner = x.args[0] if is_all_but_last(x) else _plain(x)
        if inner is None or len(x.users) > 1:
            return None
        ranked.append(x)
        x = inner
    if len(x.users) > 1 or x.args[1] not in (-1, len(g.shape(x)) - 1):
        return None
    steps: list[Step] = []
    x = x.args[0]
    if sunk:
        below = _below_sinks(x)
        if below is None:
            return None
        x, sinks = below
    while not g.is_call(x, *PRODUCTS):
        peeled = _peel(x) if g.is_tensor(x) and _is_read_once(x) else None
        if peeled is None:
            return None
        ranked.append(x)
        x, step = peeled
        steps += [step] if step is not None else []
    if len(x.users) > 1:
        return None
    with node.graph.inserting_before(node):
        heads = Heads.of(x, v, [*ranked, x, node])
        found = None if heads is None else _read_in_heads(node, heads, x, v, steps)
        if heads is None or found is None:
            return None
        found = replace(found, show=lambda new: heads.show(node, new))
        return found if sinks is None else with_sinks(node, found, sinks)


def _read_in_heads(
    node: fx.Node, heads: Heads, product: Any, v: Any, steps: list[Step]
) -> AttentionPattern | None:
    """Read steps, given from last to first, on operands with a separate head dim."""
    shown = []
    for step in reversed(steps):
        operand = None if step.operand is None else heads.beside(step.operand, step.rank)
        if step.operand is not None and operand is None:
            return None
        shown.append(replace(step, operand=operand))
    factors = [without_factors(n) for n in product.args]
    q, k_t, v = (heads.split(n) for n in (*(x for x, _ in factors), v))
    if q is None or k_t is None or v is None:
        return None
    return read_steps(node, (q, k_t), factors[0][1] * factors[1][1], v, shown)


# --- walking back ---------------------------------------------------------------------------


def _plain(x: Any) -> fx.Node | None:
    """Return the source of `x` if `x` only converts it, or splits or merges (batch, heads);
    otherwise None."""
    if not isinstance(x, fx.Node) or not x.args or not g.is_tensor(x.args[0]):
        return None
    inner = x.args[0]
    assert isinstance(inner, fx.Node)
    if g.is_call(x, aten._to_copy.default) and g.dtype(x).is_floating_point:
        return inner if g.dtype(inner).is_floating_point else None
    if g.is_call(x, aten.expand.default):
        return inner if g.shape(inner) == g.shape(x) else None
    return plain_source(x)


def _peel(x: Any) -> tuple[fx.Node, Step | None] | None:
    """Return the scores that `x` reads and the step that it applies; None for anything else."""
    inner = _plain(x)
    if inner is not None:
        return inner, None
    rank = len(g.shape(x))
    if g.is_call(x, aten.tanh.default):
        return x.args[0], Step("tanh", rank)
    if is_shifted(x):
        return x.args[0], None
    if g.is_call(x, aten.maximum.default):
        a, b = x.args if number_in(x.args[0]) is None else reversed(x.args)
        least = number_in(b) == torch.finfo(g.dtype(x)).min and g.dtype(a) == g.dtype(x)
        return (a, Step("floor", rank, number_in(b))) if least else None
    if g.is_call(x, aten.mul.Tensor, aten.div.Tensor):
        return _peel_factor(x, rank)
    if g.is_call(x, aten.add.Tensor, aten.sub.Tensor):
        a, b = x.args
        if not (g.is_tensor(a) and g.is_tensor(b)) or x.kwargs.get("alpha", 1) != 1:
            return None
        if _reaches(a) and g.shape(a) == g.shape(x):
            kind = "add" if x.target is aten.add.Tensor else "sub"
            return a, Step(kind, rank, operand=b)
        if x.target is aten.add.Tensor and _reaches(b) and g.shape(b) == g.shape(x):
            return b, Step("add", rank, operand=a)
        return None
    if g.is_call(x, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        scores, hidden, fill = x.args
        low = fill if isinstance(fill, (int, float)) else number_in(fill)
        return _hiding(x, scores, hidden, low, negated=False)
    if g.is_call(x, aten.where.self):
        condition, a, b = x.args
        if number_in(b) is not None:
            return _hiding(x, a, condition, number_in(b), negated=True)
        return _hiding(x, b, condition, number_in(a), negated=False)
    return None


def _peel_factor(x: Any, rank: int) -> tuple[fx.Node, Step | None] | None:
    a, b = x.args
    divides = x.target is aten.div.Tensor
    if x.kwargs:
        return None
    if g.is_tensor(a) and not _reaches(a) and not divides:
        a, b = b, a
    if not g.is_tensor(a) or g.shape(a) != g.shape(x):
        return None
    number = b if isinstance(b, (int, float)) else number_in(b)
    if number is not None:
        return a, Step("scale", rank, float(1 / number if divides else number))
    if g.is_tensor(b) and all(n == 1 for n in g.shape(b)):
        return a, Step("scale", rank, operand=b, divides=divides)
    return None


def _hiding(
    x: Any, scores: Any, which: Any, low: Any, negated: bool
) -> tuple[fx.Node, Step] | None:
    if low is None or not g.is_tensor(scores) or g.shape(scores) != g.shape(x):
        return None
    if g.dtype(which) is not torch.bool:
        return None
    least = torch.finfo(g.dtype(x)).min
    fill = low if low == -math.inf else least if low == least or low <= HIDING else None
    rank = len(g.shape(x))
    return None if fill is None else (scores, Step("hide", rank, fill, which, negated=negated))


def _reaches(x: Any) -> bool:
    """Return whether `x` is derived from a product by steps, that is, whether it is scores."""
    while g.is_tensor(x) and _is_read_once(x):
        if g.is_call(x, *PRODUCTS):
            return True
        peeled = _peel(x)
        if peeled is None:
            return False
        x = peeled[0]
    return False


# --- rows ---------------------------------------------------------------------------------------


def _is_read_once(x: fx.Node) -> bool:
    """Return whether one call reads `x`, apart from a maximum that is subtracted from it."""
    return sum(not (g.is_call(u, aten.amax.default) and _shifts(u, x)) for u in x.users) == 1


def _shifts(largest: fx.Node, x: fx.Node) -> bool:
    reader = next(iter(largest.users))
    if g.is_call(reader, aten.unsqueeze.default) and len(largest.users) == 1:
        largest, reader = reader, next(iter(reader.users))
    return len(largest.users) == 1 and is_shifted(reader) and reader.args[0] is x


def is_shifted(x: Any) -> bool:
    """Return whether `x` is scores minus their row maximum, which does not change the softmax."""
    if not g.is_call(x, aten.sub.Tensor) or x.kwargs:
        return False
    scores, largest = x.args
    rank = len(g.shape(x))
    if g.is_call(largest, aten.unsqueeze.default) and largest.args[1] in (-1, rank - 1):
        largest = largest.args[0]
    if not g.is_call(largest, aten.amax.default) or largest.args[0] is not scores:
        return False
    return list(largest.args[1]) in ([-1], [rank - 1])


def is_all_but_last(x: Any) -> bool:
    """Return whether `x` is a tensor without the last element of each row."""
    if not g.is_call(x, aten.slice.Tensor) or len(g.shape(x)) != 4:
        return False
    dim, start, end, step = (g.argument(x, name) for name in ("dim", "start", "end", "step"))
    return dim in (-1, 3) and start in (0, None) and (end, step) == (-1, 1)


def _below_sinks(x: Any) -> tuple[fx.Node, fx.Node] | None:
    """Return the scores, and the tensor with one number per head that is concatenated to their
    rows."""
    while is_shifted(x) and _is_read_once(x):
        x = x.args[0]
    if not g.is_call(x, aten.cat.default) or not _is_read_once(x) or len(x.args[0]) != 2:
        return None
    scores, sinks = x.args[0]
    while g.is_call(sinks, aten.expand.default):
        sinks = sinks.args[0]
    if x.args[1:] not in ((-1,), (3,)) or g.dtype(scores) != g.dtype(sinks):
        return None
    return (scores, sinks) if g.shape(sinks) == (1, g.shape(scores)[1], 1, 1) else None
