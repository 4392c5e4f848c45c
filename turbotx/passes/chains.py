"""Chains: recognises attention written out as matmul, scale, mask, softmax, matmul.

In: the last product of such a chain. Out: its `AttentionPattern`: q, k and v with heads before
rows, and what happens to the scores in between as scale, softcap, bias and mask, for example::

    softmax(where(ok, tanh(q @ k.mT / 32) * 8 + bias, -inf)) @ v
        ->  scale=0.25, softcap=8, bias=bias, mask=ok, blind_nan

Scores may pass between (batch, heads, q, k) and (batch * heads, q, k), and between dtypes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import Expr
from turbotx.ir.views import VIEWS
from turbotx.passes.operands import number_in
from turbotx.passes.scores import AttentionPattern, Step, read_steps, without_factors

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default)
SOFTMAXES = (aten.softmax.int, aten._softmax.default)
# A fill this low, or the most negative one of its dtype, leaves a key nothing beside any other:
# where a real score is as low, float32 has no digit left to tell scores apart by.
HIDING = -1e9


def read_chain(node: fx.Node) -> AttentionPattern | None:
    """`node` is the last product; walk back through softmax, masks and scale to the first.

    Emits, before `node`, what it takes to hand over operands and masks.
    """
    v: Any = node.args[1]
    x: Any = node.args[0]
    ranked: list[fx.Node] = []
    while not g.is_call(x, *SOFTMAXES):
        inner = _plain(x)
        if inner is None or len(x.users) > 1:
            return None
        ranked.append(x)
        x = inner
    if len(x.users) > 1 or x.args[1] not in (-1, len(g.shape(x)) - 1):
        return None
    steps: list[Step] = []
    x = x.args[0]
    while not g.is_call(x, *PRODUCTS):
        peeled = _peel(x) if g.is_tensor(x) and len(x.users) == 1 else None
        if peeled is None:
            return None
        ranked.append(x)
        x, step = peeled
        steps += [step] if step is not None else []
    if len(x.users) > 1:
        return None
    with node.graph.inserting_before(node):
        heads = _Heads.of(x, v, [*ranked, x, node])
        return None if heads is None else _read_in_heads(node, heads, x, v, steps)


def _read_in_heads(
    node: fx.Node, heads: _Heads, product: Any, v: Any, steps: list[Step]
) -> AttentionPattern | None:
    """Read steps, found last one first, on operands with heads in a dim of their own."""
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
    """Return what `x` shows without changing it: converted, or (batch, heads) split or merged."""
    if not isinstance(x, fx.Node) or not x.args or not g.is_tensor(x.args[0]):
        return None
    inner = x.args[0]
    assert isinstance(inner, fx.Node)
    if g.is_call(x, aten._to_copy.default) and g.dtype(x).is_floating_point:
        return inner if g.dtype(inner).is_floating_point else None
    a, b = g.shape(inner), g.shape(x)
    if g.is_call(x, aten.expand.default):
        return inner if a == b else None
    if VIEWS.get(x.target) != "reshape" or a[-2:] != b[-2:] or len(a) < 3 or len(b) < 3:
        return None
    return inner


def _peel(x: Any) -> tuple[fx.Node, Step | None] | None:
    """Return the scores below `x` and what `x` does to them; None for anything else."""
    inner = _plain(x)
    if inner is not None:
        return inner, None
    rank = len(g.shape(x))
    if g.is_call(x, aten.tanh.default):
        return x.args[0], Step("tanh", rank)
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
    """Tell whether `x` is scores: whether a product is found by peeling."""
    while g.is_tensor(x) and len(x.users) == 1:
        if g.is_call(x, *PRODUCTS):
            return True
        peeled = _peel(x)
        if peeled is None:
            return False
        x = peeled[0]
    return False


# --- heads ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Heads:
    """How (batch * heads, ...) splits into (batch, heads, ...); heads is 1 where nothing says."""

    batch: Expr
    heads: Expr

    @staticmethod
    def of(product: Any, v: Any, shown: list[Any]) -> _Heads | None:
        """Find the split: in the shapes that scores or operands have somewhere."""
        if not all(g.is_tensor(n) and len(g.shape(n)) in (3, 4) for n in (*shown, v)):
            return None
        users = [u for u in shown[-1].users if VIEWS.get(u.target) == "reshape"]
        four = {g.shape(n)[:2] for n in shown if len(g.shape(n)) == 4}
        if not four:
            sources = (_source_of(n) for n in (*product.args, v))
            four = {g.shape(n)[:2] for n in (*sources, *users) if n and len(g.shape(n)) == 4}
            count = g.shape(product)[0]
            four = {f for f in four if (f[0] * f[1] - count).expand() == 0 and f[1].is_Integer}
        if len(four) > 1:
            return None
        batch, heads = next(iter(four), (g.shape(product)[0], g.size(1)))
        return _Heads(batch, heads)

    def split(self, x: Any) -> Any:
        """Return (batch, heads, rows, columns) of (batch * heads, rows, columns), or None."""
        if x is None or len(g.shape(x)) == 4:
            return x
        if g.is_call(x, aten.permute.default) and list(x.args[1]) == [0, 2, 1]:
            source = self.split(x.args[0])
            return None if source is None else g.emit(x, aten.permute.default, source, [0, 1, 3, 2])
        source = _source_of(x)
        if source is not None and g.shape(source)[:2] == (self.batch, self.heads):
            return source
        if self.heads == 1:
            return g.emit(x, aten.unsqueeze.default, x, 1)
        new = g.emit(x, aten.unflatten.int, x, 0, [-1, int(self.heads)])
        return new if g.shape(new)[:2] == (self.batch, self.heads) else None

    def beside(self, operand: fx.Node, rank: int) -> Any:
        """Return what is added to scores of `rank` dims so that it fits those of four."""
        shape = g.shape(operand)
        if rank == 4 or len(shape) < 3 or shape[0] == 1:
            return operand
        return self.split(operand)


def _source_of(x: Any) -> fx.Node | None:
    """Return the tensor of four dims that `x` merges the first two of."""
    if g.is_call(x, aten.permute.default):
        x = x.args[0]
    if not isinstance(x, fx.Node) or VIEWS.get(x.target) != "reshape":
        return None
    source = x.args[0]
    assert isinstance(source, fx.Node)
    same = len(g.shape(source)) == 4 and g.shape(source)[2:] == g.shape(x)[1:]
    return source if same else None
