"""Scalarizer: emits the statements that compute one element of an fx node's tensor.

In: an fx node and an index over the loops. Out: an `Element`; the statements that compute it are
appended to the body once. Views only rewrite the index, at no cost. Example::

    element(layer_norm, (row, col))  ->  loads of x, weight and bias, welford, sub, mul, ...
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import fx

from turbotx import ir
from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import ZERO, Expr, is_nonnegative, product
from turbotx.ir.strides import root_layout
from turbotx.ir.views import NeedsFactoring, input_index, is_view, reshape_index, view_source
from turbotx.ops import OF_NUMBERS, OPS, Row
from turbotx.ops.builder import Element, KernelBuilder
from turbotx.ops.loop_nest import FusionConflict, LoopNest, NeedsAxisSplit

WITHIN = "within"  # the axis that stands for a position inside a masked range
MOST_TIMES = 32  # places at which one kernel computes a value; writes in a row double them


def follow(node: fx.Node) -> tuple[Scalarizer, tuple[Expr, ...], Element | None]:
    """Return the statements that compute one element of a node from inputs and parameters, its
    index, and the element; None for it if no single kernel can compute it."""
    loops = LoopNest({})
    scalarizer = Scalarizer(lambda n: n.op in ("placeholder", "get_attr"), loops)
    index = tuple(loops.make(extent, f"a{d}") for d, extent in enumerate(g.shape(node)))
    try:
        return scalarizer, index, scalarizer.element(node, index)
    except (FusionConflict, NeedsAxisSplit):
        return scalarizer, index, None


class Scalarizer(KernelBuilder):
    """IR builder passed to the op table's rules; emits statements on demand.

    loaded: whether a tensor node is already in memory; other views are traversed to their source.
    as_stored: nodes whose values are to be as their dtype keeps them in memory.
    """

    def __init__(
        self, loaded: Callable[[fx.Node], bool], loops: LoopNest,
        as_stored: Collection[fx.Node] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.loaded, self.as_stored, self.loops = loaded, as_stored, loops
        self.params: dict[fx.Node, str] = {}
        self.requirements: dict[Expr, str] = {}
        self._pulled: dict[Any, Element] = {}
        self._masks: list[Element] = []
        self._ranges: list[tuple[Expr, Expr]] = []
        self._stack: list[fx.Node] = []
        self._times: Counter[fx.Node] = Counter()

    def bounds(self, value: Expr) -> tuple[Expr | None, Expr | None]:
        """Return the minimum and maximum of an index expression, None where unknown."""
        return self.loops.bounds(value)

    def split(self, flat: Expr, by: Expr) -> tuple[Expr, Expr]:
        """Return the quotient and remainder of a flat index by an extent, as expressions over
        axes."""
        return self.loops.split(flat, by)

    # --- elements on demand ---

    def element(self, node: Any, index: tuple[Expr, ...]) -> Element:
        """Return the element of `node` at `index`, in its compute dtype."""
        if not isinstance(node, fx.Node):
            return self.constant(node, _scalar_dtype(node))
        mask = self._masks[-1].name if self._masks else None
        key = (node, index, mask)
        if key not in self._pulled:
            self._pulled[key] = self._pull(node, index)
        return self._pulled[key]

    def _pull(self, node: fx.Node, index: tuple[Expr, ...]) -> Element:
        if is_view(node) and not self.loaded(node):
            try:
                inner = input_index(node, index)
            except NeedsFactoring:
                source = g.shape(view_source(node))
                inner = reshape_index(index, g.shape(node), source, self.split)
            return self.element(view_source(node), inner)
        row = OPS.get(node.target)
        if self.loaded(node) or row is None:
            return self._load(node, index)
        self._times[node] += 1
        if self._times[node] > MOST_TIMES:
            raise FusionConflict(
                node, f"{node.name} would be computed more than {MOST_TIMES} times"
            )
        self._stack.append(node)
        try:
            value = self._pointwise(row, node, index) if row.kind == "pointwise" else row.rule(
                self, node, index
            )  # fmt: skip
        finally:
            self._stack.pop()
        value, dtype = self.cast(value, g.dtype(node)), g.dtype(node)
        converts = (
            node.target is torch.ops.aten._to_copy.default and g.dtype(g.operand(node, 0)) != dtype
        )
        return self.rounded(value, dtype) if converts or node in self.as_stored else value

    def _pointwise(self, row: Row, node: fx.Node, index: tuple[Expr, ...]) -> Element:
        dtype = self.compute_dtype(node)
        if g.dtype(node) is torch.bool:
            dtype = _common_dtype(node)

        def convert(position: int, value: Any) -> Any:
            if isinstance(value, fx.Node) and g.is_tensor(value):
                element = self.element(value, self.broadcast(value, index))
                if row.jumps or g.dtype(value) != g.dtype(node):
                    element = self.rounded(element, g.dtype(value))
                return element if position in row.as_is else self.cast(element, dtype)
            if isinstance(value, fx.Node):
                return self.number(value, dtype)
            if isinstance(value, (bool, int, float)) and position not in row.as_is:
                return value
            return value

        args = [convert(k, a) for k, a in enumerate(node.args)]
        if not any(isinstance(a, Element) for a in args):
            raise FusionConflict(node, f"{node.name} has no tensor argument")
        like = next(a for k, a in enumerate(args) if isinstance(a, Element) and k not in row.as_is)
        first_scalar = [
            self.constant(a, like.dtype) if k == 0 and isinstance(a, (bool, int, float)) else a
            for k, a in enumerate(args)
        ]
        kwargs = {k: v for k, v in node.kwargs.items() if k not in _IGNORED}
        return row.rule(self, *first_scalar, **kwargs)

    def _load(self, node: fx.Node, index: tuple[Expr, ...]) -> Element:
        strides = root_layout(node).strides
        offset = sum((i * s for i, s in zip(index, strides, strict=True)), ZERO)
        mask = self._masks[-1].name if self._masks else None
        access = ir.Access(self._param(node), sympy.expand(offset), mask)
        return self.emit_load(access, g.dtype(node))

    def number(self, value: Any, dtype: torch.dtype) -> Element:
        """Return a number, a size, or a float computed from sizes (in float64), as an element."""
        if isinstance(value, (bool, int, float)):
            return self.constant(value, dtype)
        if not isinstance(value.meta["val"], (float, torch.SymFloat)):
            return self.cast(self.index(g.size(value)), dtype)
        args = [self.number(a, torch.float64) for a in value.args]
        op = OF_NUMBERS[value.target]
        return self.cast(self.call(op, *args) if op else args[0], dtype)

    def broadcast(self, node: Any, index: tuple[Expr, ...]) -> tuple[Expr, ...]:
        """Return the index into `node` that broadcasts to a result's `index`."""
        shape = g.shape(node)
        kept = index[len(index) - len(shape) :]
        return tuple(ZERO if extent == 1 else i for extent, i in zip(shape, kept, strict=True))

    def position(self, value: Element, extent: Expr, wrap: bool = False) -> Expr:
        """Return a gathered index as an expression, checked to lie in [0, extent), at run time if
        needed."""
        if value.index is not None:
            low, high = self._bounds_here(value.index)
            if low is not None and is_nonnegative(low) and high is not None:
                if not is_nonnegative(extent - 1 - high):
                    self.requirements[(extent - 1 - high).expand()] = f"{high} < {extent}"
                return value.index
        if not is_nonnegative(extent - 1):  # a failing check reads the first element
            places = product([n for _, n in self._ranges])
            some = extent - 1 if is_nonnegative(places - 1) else sympy.Max(extent - 1, -places)
            self.requirements[some] = f"0 < {extent}"
        value = self.cast(value, torch.int64)
        if wrap:
            zero = self.constant(0, torch.int64)
            value = self.where(value < zero, value + self.index(extent), value)
        mask = None
        if self._masks:  # checked wherever the mask is known, possibly in an inner loop
            value, mask = self.where(self._masks[-1], value, 0), self._masks[-1].name
        check = ir.Check(value.name, extent, mask)
        if check not in self.body:
            self.body.append(check)
        return ir.value_symbol(value.name)

    def _bounds_here(self, value: Expr) -> tuple[Expr | None, Expr | None]:
        """Return the minimum and maximum of an index where the enclosing masks hold."""
        within = ir.axis_symbol(WITHIN)
        for place, extent in reversed(self._ranges):
            axes = [x for x in place.free_symbols if x.name[0] == "@"]
            steady = next((x for x in axes if place.coeff(x) == 1), None)
            if steady is None:
                continue
            moved = sympy.expand(value.xreplace({steady: within - (place - steady)}))
            if within in moved.free_symbols and not moved.free_symbols & set(axes):
                return self.loops.bounds(moved, {WITHIN: extent})
        return self.bounds(value)

    @contextmanager
    def masked(self, condition: Element, *ranges: tuple[Expr, Expr]) -> Iterator[Element]:
        """Load under `condition` (and the enclosing ones): nothing is read elsewhere.

        ranges: (position, extent) for which the condition implies 0 <= position < extent.
        """
        if condition.value is True:
            yield condition
            return
        whole = self.call("and", self._masks[-1], condition) if self._masks else condition
        self._masks.append(whole)
        self._ranges += ranges
        try:
            yield condition
        finally:
            self._masks.pop()
            del self._ranges[len(self._ranges) - len(ranges) :]

    def _param(self, node: fx.Node) -> str:
        if node not in self.params:
            base = "".join(c if c.isalnum() and c.isascii() else "_" for c in param_base(node))
            taken = set(self.params.values())
            name, k = base, 1
            while name in taken:
                name, k = f"{base}{k}", k + 1
            self.params[node] = name
        return self.params[node]

    # --- reductions ---

    def reduce_node(
        self,
        op: str,
        node: fx.Node,
        index: tuple[Expr, ...],
        before: Callable[[Element], Element] | None = None,
    ) -> tuple[tuple[Element, ...], Element]:
        """Reduce a node's first argument over its `dim`s; return the results and the element
        count."""
        source = g.operand(node, 0)
        target: Any = node.target
        rank = len(g.shape(source))
        names = {a.name for a in target._schema.arguments}
        dims = g.argument(node, "dim") if "dim" in names else None
        keep = bool(g.argument(node, "keepdim")) if "keepdim" in names else False
        listed = [dims] if isinstance(dims, int) else dims
        chosen = {d % rank for d in listed} if listed and rank else set(range(rank))
        rest = iter(d for d in range(len(index)))
        full: list[Expr] = []
        for d in range(rank):
            if d in chosen:
                full.append(ZERO)
                if keep:
                    next(rest)
            else:
                full.append(index[next(rest)])
        dtype = torch.bool if op in ("any", "all") else self.compute_dtype(node)
        return self.reduce_dims(op, source, sorted(chosen), tuple(full), dtype, before)

    def reduce_dims(
        self,
        op: str,
        source: Any,
        dims: Sequence[int],
        index: tuple[Expr, ...],
        dtype: torch.dtype,
        before: Callable[[Element], Element] | None = None,
    ) -> tuple[tuple[Element, ...], Element]:
        """Reduce `source` over `dims`; `index` gives the positions in the other dims. Returns the
        results and the element count."""
        shape = g.shape(source)
        extents = tuple(shape[d] for d in dims)
        kept = tuple(i for d, i in enumerate(index) if d not in dims)

        def pull(inner: tuple[Expr, ...]) -> Element:
            full = list(index)
            for d, i in zip(dims, inner, strict=True):
                full[d] = i
            element = self.element(source, tuple(full))
            if dtype is torch.bool:
                value = self.truth(self.rounded(element, g.dtype(source)))
            else:
                value = self.cast(element, dtype)
            return value if before is None else before(value)

        results = self.reduce(op, pull, extents, kept, self._stack[-1])
        counted = results[0].dtype if results[0].dtype.is_floating_point else torch.float32
        return results, self.cast(self.index(product(extents)), counted)

    def reduce(
        self,
        op: str,
        pull: Callable[[tuple[Expr, ...]], Element],
        extents: Sequence[Expr],
        kept: Sequence[Expr],
        node: fx.Node,
    ) -> tuple[Element, ...]:
        """Reduce `pull(inner index)` over `extents`; the result is at index `kept`. Raises
        FusionConflict inside a masked part."""
        used = self._axes_at(kept, node)
        masked = bool(self._masks)
        with self._unmasked(used, node):
            if all(extent == 1 for extent in extents):
                return self.reduce_one(op, pull(tuple(ZERO for _ in extents)))
            inner = self.loops.row_index(tuple(extents), used, node)
            if masked and set(self.loops.axes) - used - set(self.loops.rows):
                raise FusionConflict(node, f"{node.name} reduces inside a masked part (cat or pad)")
            return self.emit_reduce(op, pull(inner))

    def scan(
        self, op: str, source: Any, d: int, index: tuple[Expr, ...], dtype: torch.dtype
    ) -> Element:
        """Return the scan `op` of `source` along dim `d`, at `index`. Raises FusionConflict inside
        a masked part, if it is read at a position other than the scan's, or if it would be
        repeated."""
        node = self._stack[-1]
        extent = g.shape(node)[d]  # its source's may be another expression for the same size
        if self._masks:
            raise FusionConflict(node, f"{node.name} runs inside a masked part (cat or pad)")
        used = self._axes_at([*index[:d], *index[d + 1 :]], node)
        if extent != 1:
            (along,) = self.loops.row_index((extent,), used, node)
            if sympy.expand(along - index[d]) != 0:
                raise FusionConflict(
                    node, f"{node.name} is read at other places than it runs along"
                )
            again = [n for n in self.loops.axes if n not in used and n not in self.loops.rows]
            if again:
                times = product([self.loops.axes[n] for n in again])
                raise FusionConflict(node, f"{node.name} would run {times} times, always the same")
        value = self.cast(self.element(source, index), dtype)
        return value if extent == 1 else self.emit_scan(op, value)

    @contextmanager
    def _unmasked(self, used: set[str], node: fx.Node) -> Iterator[None]:
        """Suspend the masks of cat and pad inside the context: a reduction in a masked part covers
        the whole row. Raises FusionConflict if a mask varies over the `used` axes or depends on a
        loaded value."""
        masks, self._masks = self._masks, []
        ranges, self._ranges = self._ranges, []
        if any(self._varies_over(mask) & (used | {"%"}) for mask in masks):
            self._masks, self._ranges = masks, ranges
            raise FusionConflict(node, f"{node.name} reduces inside a masked part (cat or pad)")
        try:
            yield
        finally:
            self._masks, self._ranges = masks, ranges

    def _varies_over(self, value: Element) -> set[str]:
        """Return the axes that a value depends on, and "%" if it depends on loaded values."""
        made = {name: s for s in self.body for name in ir.results_of(s)}
        found, left = set(), [value.name]
        while left:
            s = made[left.pop()]
            left += ir.needs_of(s)
            if isinstance(s, ir.Load):
                found.add("%")
            if isinstance(s, ir.Index):
                found |= ir.axes_in(s.value)
        return found

    def _axes_at(self, kept: Sequence[Expr], node: fx.Node) -> set[str]:
        """Return the axes that the position of a reduction or scan depends on."""
        symbols = [s for i in kept for s in i.free_symbols]
        if any(s.name[0] == "%" for s in symbols):
            raise FusionConflict(node, f"{node.name} reduces at a gathered position")
        return {s.name[1:] for s in symbols if s.name[0] == "@"}


_IGNORED = {"memory_format", "layout", "device", "pin_memory", "non_blocking", "dtype", "copy"}


def _scalar_dtype(value: Any) -> torch.dtype:
    if isinstance(value, bool):
        return torch.bool
    return torch.int64 if isinstance(value, int) else torch.float32


def _common_dtype(node: fx.Node) -> torch.dtype:
    """Return the dtype to which a comparison's arguments are promoted, as a compute dtype."""
    values = [g.fake(a) for a in node.args]
    values = [v for v in values if isinstance(v, (torch.Tensor, bool, int, float))]
    found = values[0].dtype if len(values) == 1 else None
    if found is None:
        found = torch.result_type(values[0], values[1])
    return torch.float32 if found in (torch.float16, torch.bfloat16) else found


def param_base(node: fx.Node) -> str:
    """Return a param name that is the same in equal kernels of different layers."""
    if node.op == "get_attr":
        parts = reversed(str(node.target).split("."))
        return next((p for p in parts if not p[0].isdigit()), "item")  # of a ParameterList, its own
    if node.op == "placeholder":
        return node.name
    return node.name.rstrip("0123456789").rstrip("_") or node.name
