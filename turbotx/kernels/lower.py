"""Lower: a region's nodes become the body of one kernel by pulling elements from its outputs.

In: fx nodes to compute, the nodes to store, and which nodes are loaded. Out: an `ir.Kernel` and
its operands. Each output's element is pulled at the loop's index; views and transposes only
rewrite that index, so they cost nothing, and equal elements are one value. Example::

    out[row, col] = layer_norm(linear + bias + x)  ->  3 loads, 2 adds, welford, ..., 1 store
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod

from turbotx import graph as g
from turbotx import ir
from turbotx.kernels.element import Element, Elements
from turbotx.layout import root_layout
from turbotx.ops import OPS, Row
from turbotx.sizes import ONE, ZERO, Expr, divide, is_nonnegative, product
from turbotx.views import NeedsFactoring, input_index, is_view, reshape_index, view_source


class Conflict(Exception):
    """`node` cannot be computed inside this kernel; the message says why, for the report."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node


class SplitAxis(Exception):
    """An index needs axis `name` as two: lowering starts again with it split."""

    def __init__(self, name: str, inner: Expr) -> None:
        super().__init__(name)
        self.name, self.inner = name, inner


@dataclass(frozen=True)
class Lowered:
    """A kernel and the fx nodes behind its params, in the order of `kernel.params`."""

    kernel: ir.Kernel
    operands: tuple[fx.Node, ...]
    requirements: tuple[tuple[Expr, str], ...] = ()


@dataclass
class _Loops:
    """The axes made so far; `rows` are those that reductions run over."""

    splits: dict[str, list[Expr]]
    axes: dict[str, Expr] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)

    def make(self, extent: Expr, name: str) -> Expr:
        """Return the index expression of a new loop over `extent`, split as asked before."""
        if extent == 1:
            return ZERO
        inner = self.splits.get(name)
        if inner is None:
            self.axes[name] = extent
            return ir.axis_symbol(name)
        outer = divide(extent, inner[0])
        assert outer is not None
        high = self.make(outer, f"{name}h")
        return (high * inner[0] + self.make(inner[0], f"{name}l")).expand()


def lower(
    outputs: Sequence[fx.Node], loaded: Callable[[fx.Node], bool], name: str, sources: Sequence[str]
) -> Lowered:
    """Return one kernel that stores every output; raise Conflict where that is not possible.

    loaded(node) tells whether a tensor node lies in memory already.
    """
    splits: dict[str, list[Expr]] = {}
    while True:
        try:
            return Lowering(outputs, loaded, splits).run(name, sources)
        except SplitAxis as needed:
            splits[needed.name] = [needed.inner]


class Lowering(Elements):
    """The machine that the op table's rules speak to: it turns pulls into statements."""

    def __init__(
        self,
        outputs: Sequence[fx.Node],
        loaded: Callable[[fx.Node], bool],
        splits: dict[str, list[Expr]],
    ) -> None:
        super().__init__()
        self.outputs = outputs
        self.loaded = loaded
        self.loops = _Loops(splits)
        self.params: dict[fx.Node, str] = {}
        self.requirements: dict[Expr, str] = {}
        self._pulled: dict[Any, Element] = {}
        self._masks: list[Element] = []
        self._stack: list[fx.Node] = []

    # --- the whole kernel ---

    def run(self, name: str, sources: Sequence[str]) -> Lowered:
        first = self._main_output()
        index = {first: self._open_axes(first)}
        for node in self.outputs:
            index.setdefault(node, self._align(node, first, index[first]))
        for node in self.outputs:
            value = self.cast(self.element(node, index[node]), g.dtype(node))
            self._store(node, index[node], value)
        return self._kernel(name, sources)

    def _main_output(self) -> fx.Node:
        """The first output of the most dims decides the loops."""
        return max(self.outputs, key=lambda n: sum(extent != 1 for extent in g.shape(n)))

    def _open_axes(self, node: fx.Node) -> tuple[Expr, ...]:
        return tuple(self.loops.make(extent, f"a{d}") for d, extent in enumerate(g.shape(node)))

    def _align(
        self, node: fx.Node, first: fx.Node, index: tuple[Expr, ...]
    ) -> tuple[Expr, ...]:
        """Return the index of another output on the first one's loops, matching extents in order."""
        found: list[Expr] = []
        free = list(zip(g.shape(first), index, strict=True))
        for extent in g.shape(node):
            if extent == 1:
                found.append(ZERO)
                continue
            while free and free[0][0] != extent:
                free.pop(0)
            if not free:
                raise Conflict(node, f"{node.name} iterates over other axes than {first.name}")
            found.append(free.pop(0)[1])
        return tuple(found)

    def _store(self, node: fx.Node, index: tuple[Expr, ...], value: Element) -> None:
        if node in self.params:
            raise Conflict(node, f"{node.name} is both read and written")
        strides = root_layout(node).strides
        offset = sum((i * s for i, s in zip(index, strides, strict=True)), ZERO)
        name = self._param(node)
        self.body.append(ir.Store(ir.Access(name, sympy.expand(offset)), value.name))

    def _kernel(self, name: str, sources: Sequence[str]) -> Lowered:
        from turbotx.kernels.axes import tidy

        kinds = {n: "row" if n in self.loops.rows else "parallel" for n in self.loops.axes}
        axes = [ir.Axis(n, e, kinds[n]) for n, e in self.loops.axes.items()]
        ordered = [a for a in axes if a.kind == "parallel"]
        ordered += [next(a for a in axes if a.name == n) for n in self.loops.rows]
        stored = set(self.outputs)
        params = tuple(
            ir.Param(p, g.dtype(n), g.shape(n), "out" if n in stored else "in")
            for n, p in self.params.items()
        )
        kernel = ir.Kernel(name, params, tuple(ordered), tuple(self.body), tuple(sources))
        kernel, kept = tidy(kernel)
        operands = tuple(n for n, p in self.params.items() if p in kept)
        return Lowered(kernel, operands, tuple(self.requirements.items()))

    def _param(self, node: fx.Node) -> str:
        if node not in self.params:
            base = "".join(c if c.isalnum() else "_" for c in _base_name(node))
            taken = set(self.params.values())
            name, k = base, 1
            while name in taken:
                name, k = f"{base}{k}", k + 1
            self.params[node] = name
        return self.params[node]

    # --- pulling an element ---

    def element(self, node: Any, index: tuple[Expr, ...]) -> Element:
        """Return the element of `node` at `index`, as a value in its compute dtype."""
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
        self._stack.append(node)
        try:
            value = self._pointwise(row, node, index) if row.kind == "pointwise" else row.rule(
                self, node, index
            )  # fmt: skip
        finally:
            self._stack.pop()
        return self.cast(value, g.dtype(node))

    def _pointwise(self, row: Row, node: fx.Node, index: tuple[Expr, ...]) -> Element:
        dtype = self.compute_dtype(node)
        if g.dtype(node) is torch.bool:
            dtype = _common_dtype(node)

        def convert(position: int, value: Any) -> Any:
            if isinstance(value, fx.Node) and g.is_tensor(value):
                element = self.element(value, self.broadcast(value, index))
                return element if position in row.as_is else self.cast(element, dtype)
            if isinstance(value, fx.Node):
                return self.cast(self.index(g.size(value)), dtype)
            if isinstance(value, (bool, int, float)) and position not in row.as_is:
                return value
            return value

        args = [convert(k, a) for k, a in enumerate(node.args)]
        if not any(isinstance(a, Element) for a in args):
            raise Conflict(node, f"{node.name} has no tensor argument")
        like = next(a for k, a in enumerate(args) if isinstance(a, Element) and k not in row.as_is)
        first_scalar = [
            self.constant(a, like.dtype)
            if k == 0 and isinstance(a, (bool, int, float))
            else a
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

    def broadcast(self, node: Any, index: tuple[Expr, ...]) -> tuple[Expr, ...]:
        """Return the index into `node` that broadcasting gives for a result's `index`."""
        shape = g.shape(node)
        kept = index[len(index) - len(shape) :]
        return tuple(ZERO if extent == 1 else i for extent, i in zip(shape, kept, strict=True))

    def position(self, value: Element, extent: Expr, wrap: bool = False) -> Expr:
        """Return a gathered index as an expression, checked to lie in [0, extent) at run time."""
        if value.index is not None:
            low, high = self.bounds(value.index)
            if low is not None and is_nonnegative(low) and high is not None:
                if not is_nonnegative(extent - 1 - high):
                    self.requirements[(extent - 1 - high).expand()] = f"{high} < {extent}"
                return value.index
        value = self.cast(value, torch.int64)
        if wrap:
            zero = self.constant(0, torch.int64)
            value = self.where(value < zero, value + self.index(extent), value)
        mask = self._masks[-1].name if self._masks else None
        check = ir.Check(value.name, extent, mask)
        if check not in self.body:
            self.body.append(check)
        return ir.value_symbol(value.name)

    @contextmanager
    def masked(self, condition: Element) -> Iterator[Element]:
        """Load under `condition` (and those around it): elsewhere nothing is read."""
        if condition.value is True:
            yield condition
            return
        whole = self.call("and", self._masks[-1], condition) if self._masks else condition
        self._masks.append(whole)
        try:
            yield condition
        finally:
            self._masks.pop()

    # --- index arithmetic ---

    def bounds(self, value: Expr) -> tuple[Expr | None, Expr | None]:
        """Return the smallest and largest value of an affine index, None where unknown."""
        low = high = sympy.expand(value)
        for symbol in value.free_symbols:
            if symbol.name[0] == "%":
                return None, None
            if symbol.name[0] != "@":
                continue
            step, last = sympy.diff(value, symbol), self.loops.axes[symbol.name[1:]] - 1
            if is_nonnegative(step):
                low, high = low.xreplace({symbol: ZERO}), high.xreplace({symbol: last})
            elif is_nonnegative(-step):
                low, high = low.xreplace({symbol: last}), high.xreplace({symbol: ZERO})
            else:
                return None, None
        return sympy.expand(low), sympy.expand(high)

    def split(self, flat: Expr, by: Expr) -> tuple[Expr, Expr]:
        """Return (flat // by, flat % by), exactly; asks for an axis to be split where that helps."""
        quotient, rest = ZERO, ZERO
        for term in sympy.Add.make_args(sympy.expand(flat)):
            whole = divide(term, by)
            quotient, rest = (quotient + whole, rest) if whole is not None else (quotient, rest + term)
        if rest == 0:
            return quotient, ZERO
        low, high = self.bounds(rest)
        if low is not None and high is not None:
            if is_nonnegative(low) and is_nonnegative(by - 1 - high):
                return quotient, rest
        for name, extent in self.loops.axes.items():
            step = rest.coeff(ir.axis_symbol(name))
            inner = divide(by, step) if step != 0 else None
            if inner is not None and inner != extent and divide(extent, inner) is not None:
                raise SplitAxis(name, inner)
        return quotient + FloorDiv(rest, by), Mod(rest, by)

    # --- reductions ---

    def reduce_node(
        self,
        op: str,
        node: fx.Node,
        index: tuple[Expr, ...],
        before: Callable[[Element], Element] | None = None,
    ) -> tuple[tuple[Element, ...], Element]:
        """Reduce a node's first argument over its `dim`s; return the results and the count."""
        source = node.args[0]
        rank = len(g.shape(source))  # type: ignore[arg-type]
        names = {a.name for a in node.target._schema.arguments}  # type: ignore[union-attr]
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
        """Reduce `source` over `dims`; `index` gives the other dims' places (others ignored)."""
        shape = g.shape(source)
        extents = tuple(shape[d] for d in dims)
        kept = tuple(i for d, i in enumerate(index) if d not in dims)

        def pull(inner: tuple[Expr, ...]) -> Element:
            full = list(index)
            for d, i in zip(dims, inner, strict=True):
                full[d] = i
            element = self.element(source, tuple(full))
            value = self.truth(element) if dtype is torch.bool else self.cast(element, dtype)
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
        """Reduce `pull(inner index)` over `extents`; the result stands at the `kept` index."""
        if self._masks:
            raise Conflict(node, f"{node.name} reduces inside a masked part (cat or pad)")
        used = {s.name[1:] for i in kept for s in i.free_symbols if s.name[0] == "@"}
        for i in kept:
            for symbol in i.free_symbols:
                if symbol.name[0] == "%":
                    raise Conflict(node, f"{node.name} reduces at a gathered position")
        if all(extent == 1 for extent in extents):
            return self.reduce_one(op, pull(tuple(ZERO for _ in extents)))
        inner = self._row_index(tuple(extents), used, node)
        return self.emit_reduce(op, pull(inner))

    def _row_index(
        self, extents: tuple[Expr, ...], used: set[str], node: fx.Node
    ) -> tuple[Expr, ...]:
        loops = self.loops
        if not loops.rows:
            loops.rows = self._choose_rows(extents, used)
        if used & set(loops.rows):
            raise Conflict(node, f"{node.name} reduces over another axis than the rest of the run")
        lengths = [loops.axes[n] for n in loops.rows]
        symbols = [ir.axis_symbol(n) for n in loops.rows]
        long = [e for e in extents if e != 1]
        if lengths == long:
            rest = iter(symbols)
            return tuple(ZERO if e == 1 else next(rest) for e in extents)
        if product(lengths) != product(extents):
            shown = " x ".join(map(str, lengths))
            raise Conflict(node, f"{node.name} reduces over {extents}, the run's rows are {shown}")
        return reshape_index(symbols, lengths, extents, self.split)

    def _choose_rows(self, extents: tuple[Expr, ...], used: set[str]) -> list[str]:
        """Pick the loops that a reduction runs over: existing ones it is free of, or new ones.

        Sharing a loop with the elements that read the result is what keeps a row in registers.
        """
        loops = self.loops
        free = [n for n in loops.axes if n not in used]
        chosen: list[str] = []
        for extent in reversed([e for e in extents if e != 1]):
            match = next((n for n in reversed(free) if loops.axes[n] == extent), None)
            if match is None:
                break
            free = free[: free.index(match)]
            chosen.insert(0, match)
        else:
            return chosen
        free = [n for n in loops.axes if n not in used]
        if free and product([loops.axes[n] for n in free]) == product(extents):
            return free
        made: list[str] = []
        before = set(loops.axes)
        for k, extent in enumerate(extents):
            loops.make(extent, f"r{k}")
        made = [n for n in loops.axes if n not in before]
        return made or [next(iter(loops.axes))]


_IGNORED = {"memory_format", "layout", "device", "pin_memory", "non_blocking", "dtype", "copy"}


def _scalar_dtype(value: Any) -> torch.dtype:
    if isinstance(value, bool):
        return torch.bool
    return torch.int64 if isinstance(value, int) else torch.float32


def _common_dtype(node: fx.Node) -> torch.dtype:
    """Return the dtype in which a comparison's arguments meet, for computing."""
    values = [g.fake(a) for a in node.args]
    values = [v for v in values if isinstance(v, (torch.Tensor, bool, int, float))]
    found = values[0].dtype if len(values) == 1 else None
    if found is None:
        found = torch.result_type(values[0], values[1])
    return torch.float32 if found in (torch.float16, torch.bfloat16) else found


def _base_name(node: fx.Node) -> str:
    """Return a name that equal kernels of different layers share."""
    if node.op == "get_attr":
        return str(node.target).rsplit(".", 1)[-1]
    if node.op == "placeholder":
        return node.name
    return node.name.rstrip("0123456789").rstrip("_") or node.name
