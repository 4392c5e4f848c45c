"""Masks: analyses an attention's boolean mask term by term: causal, key mask, lengths, window.

In: a mask computed in the graph by any chain of ops. Out: a `Mask`: keys masked per batch row (or
their number), causality, a window, and the remaining terms, for example::

    expand(key_ok & (k <= q) & (k > q - 128))  ->  keys=[key_ok], causal=True, window=(127, -1)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from turbotx import ir
from turbotx.ir import fx_nodes as g
from turbotx.ir.attention_ops import NO_WINDOW
from turbotx.ir.expr import ZERO, Expr, expr
from turbotx.ops.scalarizer import follow

aten = torch.ops.aten

COMPARES = ("le", "lt", "ge", "gt")


@dataclass
class Mask:
    """The parts of a mask.

    window: number of keys visible before and after a query's position, -1 for all.
    late: whether the last query is aligned with the last key instead of the first with the first;
    None if not determined yet.
    keys, rest: boolean nodes; their conjunction is the rest of the mask.
    lengths: for a term of `keys` of the form key < n, the node that holds n per batch row.
    """

    keys: list[fx.Node] = field(default_factory=list)
    rest: list[fx.Node] = field(default_factory=list)
    causal: bool = False
    window: tuple[int, int] = NO_WINDOW
    late: bool | None = None
    lengths: dict[fx.Node, fx.Node] = field(default_factory=dict)


def understand_mask(mask: fx.Node, q: fx.Node, k: fx.Node, said: Mask) -> None:
    """Split a conjunction into terms and record each of them in `said`."""
    if g.is_call(mask, aten.expand.default):
        understand_mask(g.operand(mask, 0), q, k, said)
        return
    if g.is_call(mask, aten.bitwise_and.Tensor, aten.logical_and.default):
        for position in range(2):
            understand_mask(g.operand(mask, position), q, k, said)
        return
    term = _Term(mask)
    if term.is_true:
        return
    lengths = (g.shape(q)[2], g.shape(k)[2])
    shape = (expr(1),) * (4 - len(g.shape(mask))) + g.shape(mask)
    band = None
    if shape[2:] == lengths:
        for late in (False, True) if said.late is None else (said.late,):
            band = band or term.band(lengths[1] - lengths[0] if late else ZERO)
            if band is not None:
                said.late = late
                break
    if shape[1] == 1 and shape[2] == 1 and shape[3] == lengths[1]:
        said.keys.append(mask)
        counted = term.lengths(g.shape(q)[0])
        if counted is not None:
            said.lengths[mask] = counted
    elif band is not None:
        _narrow(said, *band)
    else:
        said.rest.append(mask)


def _narrow(said: Mask, left: int, right: int) -> None:
    """Add a band to `said`: the tighter limit on each side applies."""
    if right == 0:
        said.causal, right = True, -1
    both = zip(said.window, (left, right), strict=True)
    before, after = (min(a, b) if a >= 0 and b >= 0 else max(a, b) for a, b in both)
    said.window = (before, after)
    if said.causal:
        said.window = (said.window[0], -1)


class _Term:
    """One term of a mask, lowered to statements over its own index."""

    def __init__(self, mask: fx.Node) -> None:
        scalarizer, self.index, element = follow(mask)
        self.made: dict[str, ir.Statement] = {}
        self.compare: ir.Compute | None = None
        self.is_true = element is not None and element.value is True
        if element is None:
            return
        self.nodes = {name: node for node, name in scalarizer.params.items()}
        for s in scalarizer.body:
            self.made.update(dict.fromkeys(ir.results_of(s), s))
        last = self.made.get(element.name)
        if isinstance(last, ir.Compute) and last.op in COMPARES:
            self.compare = last

    def band(self, shift: Expr) -> tuple[int, int] | None:
        """Return (left, right), -1 for no limit, if the term compares positions: k - q <= right, q
        - k <= left, or |q - k| <= both; otherwise None. Query positions are shifted by `shift`
        keys."""
        self.shift = shift
        if self.compare is None or len(self.index) < 2:
            return None
        low, high = self.compare.args
        if self.compare.op in ("ge", "gt"):
            low, high = high, low
        strict = self.compare.op in ("lt", "gt")
        absolute = self.made.get(low)
        if isinstance(absolute, ir.Compute) and absolute.op == "abs":
            limit, inner = self._place(high), self._place(absolute.args[0])
            if limit is None or inner is None or not limit.is_Integer:
                return None
            if self._distance(inner) != 0 and self._distance(-inner) != 0:
                return None
            reach = int(limit) - strict
            return (reach, reach) if reach >= 0 else None
        first, second = self._place(low), self._place(high)
        if first is None or second is None:
            return None
        ahead, behind = self._distance(first - second), self._distance(second - first)
        if ahead is not None and int(-ahead) - strict >= 0:  # k - q + ahead <= 0
            return -1, int(-ahead) - strict
        if behind is not None and int(behind) - strict >= 0:  # q - k <= behind
            return int(behind) - strict, -1
        return None

    def _distance(self, value: Expr) -> Expr | None:
        """Return the constant c if value is k - (q + shift) + c; otherwise None."""
        rest = (value - self.index[-1] + self.index[-2] + self.shift).expand()
        return rest if rest.is_Integer else None

    def _place(self, name: str) -> Expr | None:
        """Return an integer value as an expression of loop indices; None if it is not one."""
        s = self.made.get(name)
        if isinstance(s, ir.Index):
            return s.value
        if isinstance(s, ir.Constant) and not isinstance(s.value, bool):
            return expr(int(s.value)) if s.value == int(s.value) else None
        if isinstance(s, ir.Compute) and s.op in ("add", "sub", "neg"):
            parts = [p for a in s.args if (p := self._place(a)) is not None]
            if len(parts) < len(s.args):
                return None
            if s.op == "neg":
                return -parts[0]
            return parts[0] + parts[1] if s.op == "add" else parts[0] - parts[1]
        return None

    def lengths(self, batch: Expr) -> fx.Node | None:
        """Return the int64 (batch,) node n if the term is key < n[batch row]; otherwise None."""
        if self.compare is None or len(self.index) != 4:
            return None
        low, high = self.compare.args
        if self.compare.op == "gt":
            low, high = high, low
        elif self.compare.op != "lt":
            return None
        load = self.made.get(high)
        if self._place(low) != self.index[-1] or not isinstance(load, ir.Load):
            return None
        node = self.nodes[load.access.param]
        if g.dtype(node) is not torch.int64 or g.shape(node) != (batch,):
            return None
        return node if load.access.offset == self.index[0] and not load.access.mask else None
