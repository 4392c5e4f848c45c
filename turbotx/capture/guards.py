"""Guards: the conditions on dims under which a traced graph is valid.

In: an exported program, its shape environment and the dims' names. Out: the conditions that a
call's sizes must meet, for example::

    x[:, 2:] and x.squeeze(0)  ->  seq - 2 >= 0, batch != 1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Max, Min
from torch.utils._sympy.printers import PythonPrinter

from turbotx.ir.expr import ZERO, Expr, expr, is_nonnegative

aten = torch.ops.aten
Written: TypeAlias = tuple[set[Expr], set[tuple[Expr, Expr]]]
_SELECT_SCATTER, _SLICE_SCATTER = aten.select_scatter.default, aten.slice_scatter.default
_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)


@dataclass(frozen=True)
class Guard:
    """A condition on the dims, each at least 1, that held while tracing; `text` is shown if it
    fails."""

    condition: sympy.Basic
    text: str


def find_guards(
    exported: Any, shape_env: Any, symbols: Mapping[sympy.Symbol, sympy.Symbol]
) -> tuple[Guard, ...]:
    """Return what tracing assumed of the dims; for sizes that may be 1, see size_questions.py.

    A guard keeps the symbols that it was recorded with: a symbol that was later found equal to
    another, as by adding a second input, is replaced by that one.
    """
    guards = []
    for symbol, interval in exported.range_constraints.items():
        name = symbols.get(symbol)
        if name is None:
            continue
        if interval.upper.is_Integer and interval.upper < 2**31:
            condition = sympy.Le(name, interval.upper)
            guards.append(Guard(condition, f"{name} <= {interval.upper}"))
        if interval.lower.is_Integer and interval.lower > 1:
            condition = sympy.Ge(name, interval.lower)
            guards.append(Guard(condition, f"{name} >= {interval.lower}"))
    for guard in shape_env.guards if shape_env is not None else ():
        condition = shape_env.replace(guard.expr).xreplace(dict(symbols))
        if condition.free_symbols and condition.free_symbols <= set(symbols.values()):
            guards.append(Guard(condition, PythonPrinter().doprint(condition)))
    return tuple(dict.fromkeys(guards))


def find_replaced(
    shape_env: Any, symbols: Mapping[sympy.Symbol, sympy.Symbol]
) -> dict[sympy.Symbol, sympy.Basic]:
    """Return what each symbol that was found equal to other symbols or to a number is replaced
    by."""
    old = shape_env.replacements if shape_env is not None else ()
    return {symbol: shape_env.replace(symbol).xreplace(dict(symbols)) for symbol in old}


def guard_sizes(
    graph_module: fx.GraphModule, symbols: Mapping[sympy.Symbol, sympy.Symbol]
) -> tuple[Guard, ...]:
    """Return guards against negative sizes, and against positions outside of a dim: the traced
    graph of x[:, 2:] needs two positions, that of x[:, n] more than n."""
    nodes = list(graph_module.graph.nodes)
    fakes = [node.meta.get("val") for node in nodes]
    sizes = {expr(n) for fake in fakes if isinstance(fake, torch.Tensor) for n in fake.shape}
    least = {s for s in sizes if not (s.is_Symbol or s.is_Integer)}
    for node in nodes:
        if node.op == "call_function" and node.target is aten.select.int:
            at, extent = _selected(node)
            least |= {(extent - 1 - at).expand(), (extent + at).expand()}
    least = {s.xreplace(dict(symbols)) for s in least}
    least = {s for s in least if s.free_symbols <= set(symbols.values())}
    short = sorted((s for s in least if not is_nonnegative(s)), key=str)
    guards = (Guard(sympy.Ge(s, 0), f"{s} >= 0") for s in short)
    return tuple(guard for guard in guards if guard.condition != True)  # noqa: E712


def _selected(node: Any) -> tuple[Expr, Expr]:
    """Return the position that a select takes, and the size of its dim."""
    source, dim, at = node.args
    extent = source.meta["val"].shape[dim]
    return _value(at), expr(extent)


def find_written(graph: fx.Graph) -> Written:
    """Return what the places that are written need: expressions that must not be negative, and
    sizes that must be equal. PyTorch's tracer asks neither. graph: as traced, since the
    decompositions write nothing where eager mode raises."""
    least, equal = set[Expr](), set[tuple[Expr, Expr]]()
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in (_SELECT_SCATTER, _SLICE_SCATTER):
            continue
        names = [a.name for a in node.target._schema.arguments]
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        shape, source = (list(given[name].meta["val"].shape) for name in ("self", "src"))
        d = given.get("dim", 0) % len(shape)
        extent = expr(shape[d])
        if node.target is _SELECT_SCATTER:
            at = _value(given["index"])
            least |= {(extent - 1 - at).expand(), (extent + at).expand()}
            taken = [expr(n) for k, n in enumerate(shape) if k != d]
        else:
            start, end = given.get("start"), given.get("end")
            begin = ZERO if start is None else _value(start)
            stop = extent if end is None else _value(end)
            # A place that is negative counts from the end, at every call or at none.
            least |= {place for place in (begin, stop) if not is_nonnegative(-place - 1)}
            taken = list(map(expr, shape))
            taken[d] = _sliced(extent, begin, stop, _value(given.get("step", 1)))
        equal |= {(a, b) for a, b in zip(taken, map(expr, source), strict=True) if a != b}
    return least, equal


def _sliced(extent: Expr, begin: Expr, end: Expr, step: Expr) -> Expr:
    """Return the number of elements of begin:end:step in a dim of this size."""
    first, last = _within(begin, extent), _within(end, extent)
    return Max(ZERO, FloorDiv((last - first + step - 1).expand(), step))


def _within(place: Expr, extent: Expr) -> Expr:
    """Return a place of a slice as a number from 0 to the size of the dim."""
    place = place + extent if is_nonnegative(-place - 1) else place
    return Min(Max(place, ZERO), extent)


def _value(number: Any) -> Expr:
    return expr(number.meta["val"] if isinstance(number, fx.Node) else number)


def guard_written(
    written: Written, symbols: Mapping[sympy.Symbol, sympy.Symbol]
) -> tuple[Guard, ...]:
    """Return guards for the result of `find_written`."""
    least, equal = written
    conditions = {
        sympy.Ge(s.xreplace(dict(symbols)), 0): "a position that is written is out of range"
        for s in least
    }
    for a, b in equal:
        condition = sympy.Eq(a.xreplace(dict(symbols)), b.xreplace(dict(symbols)))
        conditions[condition] = "what is written has another size than its place"
    return tuple(
        Guard(c, f"{PythonPrinter().doprint(c)} (else {why})")
        for c, why in sorted(conditions.items(), key=str)
        if c != True  # noqa: E712
    )


def find_squeezed(graph: fx.Graph) -> set[Expr]:
    """Return the sizes that a squeeze would drop if they were 1. graph: as traced."""
    found: set[Expr] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in _SQUEEZES:
            continue
        shape = node.args[0].meta["val"].shape
        given = node.args[1] if len(node.args) > 1 else list(range(len(shape)))
        dims = given if isinstance(given, (list, tuple)) else [given]
        found |= {expr(shape[d]) for d in dims if shape}
    return {size for size in found if not size.is_Integer}


def guard_squeezed(
    squeezed: set[Expr], symbols: Mapping[sympy.Symbol, sympy.Symbol]
) -> tuple[Guard, ...]:
    """Return guards that no size kept by a squeeze is 1."""
    sizes = sorted((s.xreplace(dict(symbols)) for s in squeezed), key=str)
    return tuple(Guard(sympy.Ne(s, 1), f"{s} != 1") for s in sizes)


def guard_asked(asked: set[Expr], symbols: Mapping[sympy.Symbol, sympy.Basic]) -> tuple[Guard, ...]:
    """Return guards that no size of a tensor whose layout was queried is 1, which lies in any order
    in memory, or 0, where any layout counts as dense. asked: sizes and strides."""
    known = (s.xreplace(dict(symbols)) for s in asked)
    factors = {f for s in known for f in (s.args if s.is_Mul else (s,)) if f.free_symbols}
    kept = sorted(factors, key=str)
    guards = [Guard(sympy.Ne(f, 0), f"{f} != 0") for f in kept if not f.is_positive]
    return tuple(guards) + tuple(Guard(sympy.Ne(f, 1), f"{f} != 1") for f in kept)


def find_equals(shape_env: Any) -> dict[sympy.Symbol, sympy.Symbol]:
    """Return the symbols that a guard makes equal to an earlier symbol.

    torch.export solves a == b itself, but not 64 * n * a == 64 * n * b, which a view of (n, a, 64)
    as (n, b * 4, 16) asserts.
    """
    earlier: dict[sympy.Symbol, sympy.Symbol] = {}
    for guard in shape_env.guards if shape_env is not None else ():
        if not isinstance(guard.expr, sympy.Eq):
            continue
        left, right = (side.xreplace(earlier) for side in guard.expr.args)
        if not (left - right).is_polynomial():
            continue
        factors = [f for f, _ in sympy.factor_list(left - right)[1] if not f.is_Symbol]
        if len(factors) != 1 or len(factors[0].free_symbols) != 2:
            continue
        a, b = sorted(factors[0].free_symbols, key=_number_of)
        if factors[0] in (a - b, b - a):
            earlier = {k: v.xreplace({b: a}) for k, v in earlier.items()} | {b: a}
    return earlier


def _number_of(symbol: sympy.Symbol) -> tuple[int, str]:
    digits = "".join(c for c in symbol.name if c.isdigit())
    return int(digits or 0), symbol.name
