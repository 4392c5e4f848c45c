"""Scores: reads the ops between q k^T and softmax as scale, softcap, bias and mask.

In: q and k^T with heads before rows, and the steps between the two products in order. Out: the
`AttentionPattern` with the equivalent scale, softcap, bias and mask, or None, as in::

    / 4, tanh, * 8, + bias, where(ok, ., -inf)
      ->  scale=2, softcap=8, bias=bias, mask=ok, blind_nan
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.passes.operands import number_in, take_hidden

aten = torch.ops.aten
SMALLEST_PART = 2.0**-20
"""The least factor by which the most negative float32 still outweighs any score: 3e32."""


@dataclass(frozen=True)
class AttentionPattern:
    """An attention in the graph: softmax(cap(q k^T * scale) + bias, masked) v.

    q, k, v: (batch, heads, length, head_dim).
    mask: boolean, or a bias.
    bias: in addition to a boolean mask.
    softcap: cap(x) is softcap * tanh(x / softcap), or x if 0.
    blind_nan, blind_mean: a query that sees no key gets NaN, or the mean of the values, instead of
    zeros.
    sinks: float32 (heads,), one more score per query, without a value.
    show: converts the result (batch, q_len, heads, head_dim) to the form of the replaced call; None
    for that of sdpa.
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
    sinks: fx.Node | None = None
    show: Callable[[fx.Node], fx.Node] | None = None


@dataclass(frozen=True)
class Step:
    """A step applied to scores.

    kind: "scale" (by a number or a one-element tensor), "tanh", "add", "sub", "floor" (clamp to at
    least `number`, the most negative one), or "hide" (keys whose `operand` is true, or false if
    `negated`, get `number`).
    """

    kind: str
    rank: int
    number: float = 0.0
    operand: fx.Node | None = None
    divides: bool = False
    negated: bool = False


def read_steps(
    node: fx.Node, product: Sequence[Any], scale: float, v: Any, steps: Sequence[Step]
) -> AttentionPattern | None:
    """Return the attention with these steps between its two products; None if there is none.

    product: q and k^T, whose factors are in `scale`. Emits views of operands and masks before
    `node`.
    """
    q, k_t = product
    scores = _Scores(node, q, scale)
    if not all(scores.take(step) for step in steps):
        return None
    swaps = g.is_call(k_t, aten.permute.default) and list(k_t.args[1]) == [0, 1, 3, 2]
    k = k_t.args[0] if swaps else g.emit(node, aten.permute.default, k_t, [0, 1, 3, 2])
    return scores.found(k, v)


class _Scores:
    """Applies steps to a score of zero: its value becomes the bias."""

    def __init__(self, node: fx.Node, q: fx.Node, scale: float) -> None:
        self.node, self.q, self.scale = node, q, scale
        self.cap = 0.0
        self.bias: fx.Node | None = None  # before multiplication by `factor`
        self.factor = 1.0
        self.hides: list[tuple[Any, float]] = []  # (visible mask, fill value)
        self.folded = False  # whether hides are merged into the bias

    def take(self, step: Step) -> bool:
        """Apply a step; return False if no attention kernel supports it at this point."""
        if step.kind == "tanh":
            return self._cap()
        if step.kind == "scale":
            return self._scale(step)
        if step.kind == "hide":
            visible = step.operand if step.negated else negated(step.operand)
            self._hide(visible, step.number)
        elif step.kind == "floor":
            self._raise(step.number)
        else:
            self._add(step)
        return True

    def found(self, k: fx.Node, v: fx.Node) -> AttentionPattern:
        self._scale_bias()
        scale = self.scale * self.cap if self.cap else self.scale
        if self.folded or not self.hides:
            blind = self.bias is not None
            return AttentionPattern(
                self.q, k, v, self.bias, scale, blind_nan=blind, softcap=self.cap
            )
        mask = self.hides[0][0]
        for term, _ in self.hides[1:]:
            mask = self._emit(aten.bitwise_and.Tensor, mask, term)
        mean = self._keeps_finite()
        return AttentionPattern(
            self.q, k, v, mask, scale, blind_nan=not mean, bias=self.bias, blind_mean=mean,
            softcap=self.cap,
        )  # fmt: skip

    def _cap(self) -> bool:
        if self.cap or self.bias is not None or self.hides:
            return False
        self.cap = 1.0
        return True

    def _scale(self, step: Step) -> bool:
        if self._keeps_finite():
            return False
        if step.operand is not None:
            if self.cap:
                return False
            op = aten.div.Tensor if step.divides else aten.mul.Tensor
            self._scale_bias()
            self.q = self._emit(op, self.q, step.operand)
            self.bias = None if self.bias is None else self._emit(op, self.bias, step.operand)
            return True
        if step.number <= 0:
            return False
        if self.cap:
            self.cap *= step.number
        else:
            self.scale *= step.number
        self.factor *= step.number if self.bias is not None else 1.0
        return True

    def _scale_bias(self) -> None:
        """Multiply the bias by all factors at once: 1 / 32 followed by 32 cancels. What a mask
        hides stays the most negative number, a part of which outweighs any score as well."""
        if self.bias is not None and self.factor != 1.0:
            parts = take_hidden(self.bias) if SMALLEST_PART <= self.factor <= 1.0 else None
            if parts is None or g.dtype(self.bias) is torch.float16:  # 65504 outweighs too little
                self.bias = self._emit(aten.mul.Tensor, self.bias, self.factor)
            elif parts[1] is not None:
                scaled = self._emit(aten.mul.Tensor, parts[1], self.factor)
                self.bias = self._emit(aten.where.self, parts[0], scaled, self.bias.args[2])
        self.factor = 1.0

    def _raise(self, least: float) -> None:
        """Clamp fill values to at least `least`; the products themselves are above it."""
        self.hides = [(visible, max(number, least)) for visible, number in self.hides]
        self._scale_bias()
        if self.bias is not None and (self.folded or take_hidden(self.bias) is None):
            self.bias = self._emit(aten.clamp.default, self.bias, least)

    def _hide(self, visible: Any, number: float) -> None:
        self.hides.append((visible, number))
        if len({number for _, number in self.hides}) > 1 or self.folded:
            self._fold_hides()

    def _add(self, step: Step) -> None:
        self._scale_bias()
        added = step.operand if step.kind == "add" else self._emit(aten.neg.default, step.operand)
        if self._keeps_finite() and not self.folded:
            parts = take_hidden(added)
            half = isinstance(added, fx.Node) and g.dtype(added) is torch.float16
            if parts is not None and parts[1] is None and not half:
                # A second mask hides keys as the first does (GPT-Neo's buffer, and its padding).
                self._hide(parts[0], self.hides[0][1])
                return
            self._fold_hides()
        self.bias = added if self.bias is None else self._sum(self.bias, added)

    def _sum(self, one: fx.Node, other: Any) -> fx.Node:
        """Return the sum of two biases; if one hides what a mask hides by the most negative number,
        which outweighs the other, so does the sum (BLOOM: ALiBi's slopes and a mask)."""
        for mask, plain in ((one, other), (other, one)):
            parts = None if take_hidden(plain) else take_hidden(mask)
            if parts is not None and g.dtype(plain) == g.dtype(mask) != torch.float16:
                shown = plain if parts[1] is None else self._emit(aten.add.Tensor, parts[1], plain)
                return self._emit(aten.where.self, parts[0], shown, mask.args[2])
        return self._emit(aten.add.Tensor, one, other)

    def _keeps_finite(self) -> bool:
        """Return whether a masked score is finite, and thus changed by further steps."""
        return any(number != -math.inf for _, number in self.hides)

    def _fold_hides(self) -> None:
        """Fill masked values into the bias: the last hide, or all of them the first time."""
        self._scale_bias()
        for visible, number in self.hides[-1:] if self.folded else self.hides:
            self.bias = hide_in_bias(self.node, visible, self.bias, number)
        self.folded = True

    def _emit(self, target: Any, *args: Any) -> fx.Node:
        return g.emit(self.node, target, *args)


def with_sinks(node: fx.Node, found: AttentionPattern, sinks: fx.Node) -> AttentionPattern:
    """Return an attention with sinks (1, heads, 1, 1)."""
    flat = g.emit(node, aten.flatten.using_ints, sinks, 0, 3)
    if g.dtype(flat) is not torch.float32:
        flat = g.emit(node, aten._to_copy.default, flat, dtype=torch.float32)
    return replace(found, sinks=flat)


def without_factors(x: Any) -> tuple[Any, float]:
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


def hide_in_bias(like: fx.Node, visible: fx.Node, bias: fx.Node | None, fill: float) -> fx.Node:
    """Return where(visible, bias or 0, fill) as a bias; float32 if there was none."""
    if bias is None:
        bias = g.emit(like, aten.full_like.default, visible, 0.0, dtype=torch.float32)
    fill = max(fill, torch.finfo(g.dtype(bias)).min) if fill != -math.inf else fill
    return g.emit(like, aten.masked_fill.Scalar, bias, negated(visible), fill)


def negated(mask: Any) -> fx.Node:
    """Return the negation of a boolean mask."""
    while g.is_call(mask, aten.expand.default):
        mask = mask.args[0]
    if g.is_call(mask, aten.bitwise_not.default, aten.logical_not.default):
        (source,) = mask.args
        if g.is_tensor(source) and g.dtype(source) is torch.bool:
            return source
    return g.emit(mask, aten.logical_not.default, mask)
