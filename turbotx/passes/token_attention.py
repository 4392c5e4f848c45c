"""Token attention: rewrites attention with a key mask to attention within each sequence.

In: an `attention` over tokens. Out: a `packed_attention` over bounds, with its mask by key and its
bias by column. Refused if masked tokens would be visible, or if the bias varies by token::

    attention(q, k, v, keys, add(relative, where(keys, 0, min)))
      ->  packed_attention(q, k, v, keys, relative, None, bounds, starts)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from turbotx.ir import fx_nodes as g
from turbotx.ir.attention_ops import NO_WINDOW, attention
from turbotx.ir.packed_ops import packed_attention
from turbotx.passes.masks import Mask, understand_mask
from turbotx.passes.operands import number_in
from turbotx.passes.packer import Packer, Rule
from turbotx.passes.scores import negated
from turbotx.passes.tokens import ByToken, Refused

aten = torch.ops.aten
HIDES = -1e9
"""A score with this added has no weight beside any other in a working model."""


class _MaskParts:
    """The parts of an attention's keys and bias.

    said: terms that mask keys by token, and bands.
    rest: other terms that are added or mask, by column.
    finite: whether keys are masked by a finite number, so that a query that sees none gets the mean
    of all values.
    partial: whether keys may be masked that the call's mask does not mask.
    """

    def __init__(self, p: Packer, node: fx.Node) -> None:
        self.p, self.node = p, node
        window: Any = node.kwargs.get("window", NO_WINDOW)
        self.said = Mask(causal=bool(node.kwargs.get("causal")), late=False, window=window)
        self.keys: list[ByToken] = []
        self.rest: list[fx.Node] = []
        self.finite = self.partial = False

    def hide(self, visible: fx.Node) -> None:
        """Split a boolean mask into terms."""
        before = len(self.said.keys)
        understand_mask(visible, g.operand(self.node, 0), g.operand(self.node, 1), self.said)
        for term in self.said.keys[before:]:
            found = self.p.find(term)
            if found is None:
                self.rest.append(term)
            else:
                self._add_keys(found, self.p.known.hidden(term), self.p.known.shown(term))
        self.rest += self.said.rest
        self.said.rest.clear()

    def _add_keys(self, found: ByToken, hidden: Any, shown: Any) -> None:
        dims = ((),) * (4 - len(found.dims)) + found.dims
        if dims[1:] != ((), (), ("s",)):
            raise Refused(self.node, "has a mask that is not by key")
        if hidden is not False:
            raise Refused(self.node, "lets keys be seen that the call's mask hides")
        self.partial |= shown is not True
        made = found.node
        for _ in range(4 - len(found.dims)):
            made = self.p.emit(self.node, aten.unsqueeze.default, made, 0)
        self.keys.append(ByToken(made, dims))

    def add(self, bias: fx.Node) -> None:
        """Split what is added to scores into terms."""
        while g.is_call(bias, aten.expand.default) and bias not in self.p.values:
            bias = g.operand(bias, 0)
        if g.dtype(bias) is torch.bool:
            self.hide(bias)
        elif (
            g.is_call(bias, aten.add.Tensor)
            and not bias.kwargs
            and all(map(g.is_tensor, bias.args))
        ):
            for position in range(2):
                self.add(g.operand(bias, position))
        elif self._hides(bias):
            pass
        elif isinstance(found := self.p.values.get(bias), ByToken):
            self._add_number(bias, found)
        elif bias in self.p.values:
            raise Refused(self.node, f"adds {bias.name} to its scores, which tokens tell")
        else:
            self.rest.append(bias)

    def _hides(self, bias: fx.Node) -> bool:
        """Return whether it is where(visible, bias, a most negative number); if so, split it."""
        visible: Any
        kept: Any
        if g.is_call(bias, aten.where.self):
            visible, kept, low = bias.args
        elif g.is_call(bias, aten.masked_fill.Scalar):
            kept, hidden, low = bias.args
            visible = negated(hidden)
        else:
            return False
        number = low if isinstance(low, (int, float)) else number_in(low)
        if number is None or number > HIDES:
            return False
        self.finite |= number != -math.inf
        self.hide(visible)
        nothing = number_in(kept) == 0 or self.p.known.shown(kept) == 0
        if not nothing:
            self.add(kept)
        return True

    def _add_number(self, bias: fx.Node, found: ByToken) -> None:
        """Take a term by key that is 0 for unmasked tokens and masks the others."""
        hidden, shown = self.p.known.hidden(bias), self.p.known.shown(bias)
        if hidden is None or hidden > HIDES or shown != 0:
            raise Refused(self.node, f"adds {bias.name} to its scores, which tokens tell")
        self.finite |= hidden != -math.inf
        visible = self.p.emit(bias, aten.eq.Scalar, found.node, 0)
        self._add_keys(ByToken(visible, found.dims), False, True)


def attend(p: Packer, node: fx.Node) -> ByToken:
    """Return attention within each sequence. Raises Refused if queries or keys are not one per
    token, follow a cache, or may see padding."""
    q, k, v = (p.operand(node, i) for i in range(3))
    for x in (q, k, v):
        if len(x.dims) != 4 or x.dims[0] != ("b",) or x.dims[2] != ("s",):
            raise Refused(node, "has queries or keys that are not one a token")
    if node.kwargs.get("late"):
        raise Refused(node, "has queries that stand behind a cache")
    parts = _MaskParts(p, node)
    with p.here():
        keys, bias = g.optional(node, 3), g.optional(node, 4)
        if keys is not None and g.dtype(keys) is not torch.bool:
            raise Refused(node, "has keys counted by length, and no mask of tokens")
        if keys is not None:
            parts.hide(keys)
        if bias is not None:
            parts.add(bias)
    added, sinks = _join(p, node, parts), p.whole(g.optional(node, 5), "sinks", node)
    if not parts.keys:
        raise Refused(node, "does not hide the keys that the mask says are padding")
    shown = parts.keys[0].node
    for other in parts.keys[1:]:
        shown = p.emit(node, aten.bitwise_and.Tensor, shown, other.node)
    said = {n: x for n, x in node.kwargs.items() if n not in ("causal", "window", "late")}
    said |= {"causal": parts.said.causal}
    if parts.said.window != NO_WINDOW:
        said["window"] = parts.said.window
    if parts.finite:
        said.pop("blind_nan", None)
        said["blind_mean"] = True
    if parts.partial and said.get("blind_mean"):
        raise Refused(node, "may hide all keys of a query, which then sees padding")
    made = p.emit(
        node, packed_attention, q.node, k.node, v.node, shown, added, sinks,
        p.inputs["bounds"], p.inputs["starts"], **said,
    )  # fmt: skip
    heads, width = (p.sizes.fixed(g.shape(node)[d]) or () for d in (2, 3))
    return p.token(made, (("b",), ("s",), heads, width))


def _join(p: Packer, node: fx.Node, parts: _MaskParts) -> fx.Node | None:
    """Return the sum of the terms by column, common to all batch rows; None if there are none."""
    for term in parts.rest:
        if term in p.values or any(map(p.sizes.is_batch, g.shape(term))):
            raise Refused(node, f"adds {term.name} to its scores, which is another by batch row")
        wrong = [e for e in g.shape(term)[-2:] if e != 1 and not p.sizes.is_seq(e)]
        if wrong:
            raise Refused(node, f"adds {term.name} to its scores, which is not by columns")
    hides = [t for t in parts.rest if g.dtype(t) is torch.bool]
    adds = [t for t in parts.rest if g.dtype(t) is not torch.bool]
    made: fx.Node | None = None
    for term in hides:
        made = term if made is None else p.emit(node, aten.bitwise_and.Tensor, made, term)
    if made is not None and adds:
        least = torch.finfo(g.dtype(adds[0])).min if parts.finite else -math.inf
        hidden = p.emit(node, aten.logical_not.default, made)
        adds = [p.emit(node, aten.masked_fill.Scalar, adds[0], hidden, least), *adds[1:]]
        made = None
    for term in adds:
        made = term if made is None else p.emit(node, aten.add.Tensor, made, term)
    if made is not None and g.dtype(made) not in (torch.bool, torch.float32, g.dtype(node)):
        made = p.emit(node, aten._to_copy.default, made, dtype=torch.float32)
    while made is not None and len(g.shape(made)) < 4:
        made = p.emit(node, aten.unsqueeze.default, made, 0)
    return made


ATTENTION: dict[Any, Rule] = {attention: attend}
