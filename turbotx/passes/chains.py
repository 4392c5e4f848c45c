"""Chains: attention written out as matmul, scale, mask, softmax, matmul, read back as one.

In: the last product of such a chain. Out: its `Found`: q, k and v with heads before rows, and
what happens to the scores in between as scale, softcap, bias and mask, for example::

    softmax(where(ok, tanh(q @ k.mT / 32) * 8 + bias, -inf)) @ v
        ->  scale=0.25, softcap=8, bias=bias, mask=ok, blind_nan

Scores may pass between (batch, heads, q, k) and (batch * heads, q, k), and between dtypes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from turbotx import graph as g
from turbotx.passes.operands import number_in
from turbotx.sizes import Expr
from turbotx.views import VIEWS

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default)
SOFTMAXES = (aten.softmax.int, aten._softmax.default)
# A fill this low, or the most negative one of its dtype, leaves a key nothing beside any other:
# where a real score is as low, float32 has no digit left to tell scores apart by.
HIDING = -1e9


@dataclass(frozen=True)
class Found:
    """An attention in the graph: softmax(cap(q k^T * scale) + bias, hidden by mask) v.

    q, k, v: (batch, heads, length, head_dim). mask: boolean, or itself a bias. softcap: cap(x) is
    softcap * tanh(x / softcap), and x where it is 0. blind_nan: a query that sees no key gets NaN
    instead of zeros; blind_mean: the mean of the values. bias: beside a mask that is boolean.
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float
    causal: bool = False
    blind_nan: bool = False
    bias: fx.Node | None = None
    blind_mean: bool = False
    softcap: float = 0.0


@dataclass(frozen=True)
class Step:
    """What happens to scores. kind: "scale" (by a number or a tensor of one element), "tanh",
    "add", "sub", or "hide" (keys whose `operand` is true, or false if `negated`, get `number`)."""

    kind: str
    rank: int
    number: float = 0.0
    operand: fx.Node | None = None
    divides: bool = False
    negated: bool = False


def read_chain(node: fx.Node) -> Found | None:
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
        return None if heads is None else _replay(node, heads, x, v, steps)


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


# --- and forth --------------------------------------------------------------------------------


def _replay(node: fx.Node, heads: _Heads, product: Any, v: Any, steps: list[Step]) -> Found | None:
    """Do to a score of zero what the steps do: that is the bias, whatever their order."""
    (q, q_scale), (k_t, k_scale) = (_unscaled(n) for n in product.args)
    q, k_t, v = (heads.split(n) for n in (q, k_t, v))
    if q is None or k_t is None or v is None:
        return None
    scale, cap, bias = q_scale * k_scale, 0.0, None
    hides: list[Step] = []
    shown: list[Any] = []
    folded = False  # whether hides are in the bias already
    for step in reversed(steps):
        operand = None if step.operand is None else heads.beside(step.operand, step.rank)
        if step.operand is not None and operand is None:
            return None
        finite = any(h.number != -math.inf for h in hides)
        if step.kind == "tanh":
            if cap or bias is not None or hides:
                return None
            cap = 1.0
        elif step.kind == "scale":
            if finite or (cap and operand is not None):
                return None
            if operand is not None:
                op = aten.div.Tensor if step.divides else aten.mul.Tensor
                q = g.emit(node, op, q, operand)
                bias = None if bias is None else g.emit(node, op, bias, operand)
            elif step.number <= 0:
                return None
            else:
                scale, cap = (scale, cap * step.number) if cap else (scale * step.number, cap)
                bias = None if bias is None else g.emit(node, aten.mul.Tensor, bias, step.number)
        elif step.kind == "hide":
            hides.append(step)
            shown.append(operand if step.negated else _negated(operand))
            if len({h.number for h in hides}) > 1 or folded:
                bias, folded = _hide(node, bias, shown, hides, folded), True
        else:
            operand = operand if step.kind == "add" else g.emit(node, aten.neg.default, operand)
            if finite and not folded:
                bias, folded = _hide(node, bias, shown, hides, folded), True
            bias = operand if bias is None else g.emit(node, aten.add.Tensor, bias, operand)
    swaps = g.is_call(k_t, aten.permute.default) and list(k_t.args[1]) == [0, 1, 3, 2]
    k = k_t.args[0] if swaps else g.emit(node, aten.permute.default, k_t, [0, 1, 3, 2])
    scale = scale * cap if cap else scale
    if folded or not shown:
        return Found(q, k, v, bias, scale, blind_nan=bias is not None, softcap=cap)
    mask = shown[0]
    for term in shown[1:]:
        mask = g.emit(node, aten.bitwise_and.Tensor, mask, term)
    mean = hides[0].number != -math.inf
    return Found(
        q, k, v, mask, scale, blind_nan=not mean, bias=bias, blind_mean=mean, softcap=cap
    )  # fmt: skip


def _unscaled(x: Any) -> tuple[Any, float]:
    """Return an operand without its multiplications by numbers, and their product."""
    scale = 1.0
    while g.is_call(x, aten.mul.Tensor, aten.div.Tensor) and not x.kwargs:
        inner, factor = x.args
        number = factor if isinstance(factor, (int, float)) else number_in(factor)
        if number is None or not g.is_tensor(inner) or g.shape(inner) != g.shape(x):
            break
        if g.dtype(inner) != g.dtype(x):
            break
        x, scale = inner, scale / number if x.target is aten.div.Tensor else scale * number
    return x, scale


def _hide(
    node: fx.Node, bias: fx.Node | None, shown: list[fx.Node], hides: list[Step], folded: bool
) -> fx.Node:
    """Return the bias with what the steps hide filled in: all of them, or the last one."""
    pairs = list(zip(shown, hides, strict=True))
    for term, step in pairs[-1:] if folded else pairs:
        bias = hide_in_bias(node, term, bias, step.number)
    assert bias is not None
    return bias


def hide_in_bias(like: fx.Node, visible: fx.Node, bias: fx.Node | None, fill: float) -> fx.Node:
    """Return where(visible, bias or 0, fill) as a bias of its own, float32 where it was none."""
    if bias is None:
        bias = g.emit(like, aten.full_like.default, visible, 0.0, dtype=torch.float32)
    fill = max(fill, torch.finfo(g.dtype(bias)).min) if fill != -math.inf else fill
    return g.emit(like, aten.masked_fill.Scalar, bias, _negated(visible), fill)


def _negated(mask: Any) -> fx.Node:
    while g.is_call(mask, aten.expand.default):
        mask = mask.args[0]
    if g.is_call(mask, aten.bitwise_not.default, aten.logical_not.default):
        (source,) = mask.args
        if g.is_tensor(source) and g.dtype(source) is torch.bool:
            return source
    return g.emit(mask, aten.logical_not.default, mask)
