"""The frozen types of everything after partition, with their grammar at the top.

    kernel  := Kernel(name, params, axes, body)       one launch; prints as Triton and as C++
    params  := Param(name, dtype, shape, role)*       tensors by address, sizes by value
    axes    := parallel Axis* row Axis*               reductions run over the row axes
    body    := (Load | Index | Constant | Compute | Reduce | Scan | Store)*   in dependency order
    Load    := value = param[access]                  converted to its compute dtype
    Compute := value = primitive(value*)              see ops.PRIMITIVES
    Reduce  := value+ = reduction(value*) over all row axes; the results do not vary over them
    Scan    := value = scan(value) over all row axes, first to last; its place itself included
    Store   := param[access] = value

Extents, strides and offsets are sympy expressions over the captured dims; offsets are also over
the axes' own symbols and, for gathers, over the symbols of integer values (`%v3`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import sympy
import torch

from turbotx.ir.expr import Expr, product

PARALLEL, REDUCTION = "parallel", "row"  # these strings are part of digests


@dataclass(frozen=True)
class Axis:
    """A loop of `extent` iterations, of kind PARALLEL, or REDUCTION if reductions run over it."""

    name: str
    extent: Expr
    kind: str = PARALLEL

    @property
    def symbol(self) -> sympy.Symbol:
        """The sympy symbol of the loop index, as it occurs in offsets."""
        return axis_symbol(self.name)


def axis_symbol(name: str) -> sympy.Symbol:
    """Return the symbol of a loop index: a nonnegative integer named with a leading `@`."""
    return sympy.Symbol(f"@{name}", integer=True, nonnegative=True)


def value_symbol(name: str) -> sympy.Symbol:
    """Return the symbol of an integer value inside an offset (a gathered index)."""
    return sympy.Symbol(f"%{name}", integer=True)


@dataclass(frozen=True)
class Param:
    """A tensor argument: `role` is "in" or "out", `shape` that of the whole tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[Expr, ...]
    role: str

    @property
    def nbytes(self) -> Expr:
        """Bytes of the whole tensor, as an expression over the captured dims."""
        return product(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Access:
    """An element of a param: `offset` in elements; `mask` names a bool value or is None.

    A masked-off load reads nothing and gives zero; a masked-off store writes nothing.
    """

    param: str
    offset: Expr
    mask: str | None = None

    def stride(self, axis: Axis) -> Expr | None:
        """Return the stride in elements along `axis`; None if it is not constant."""
        step = sympy.diff(self.offset, axis.symbol)
        return None if step.has(axis.symbol) or step.has(sympy.Derivative) else step


@dataclass(frozen=True)
class Load:
    """One element read from memory, converted to the compute dtype; 0 if masked off."""

    result: str
    access: Access
    dtype: torch.dtype


@dataclass(frozen=True)
class Index:
    """An integer computed from loop indices: `result` = expr, as int64."""

    result: str
    value: Expr
    dtype: torch.dtype = torch.int64


@dataclass(frozen=True)
class Constant:
    """A literal."""

    result: str
    value: bool | int | float
    dtype: torch.dtype


@dataclass(frozen=True)
class Compute:
    """A pointwise op of `primitives.PRIMITIVES` on the values named `args`; dtype of the result."""

    result: str
    op: str
    args: tuple[str, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Reduce:
    """A reduction of `primitives.REDUCTIONS` over the row axes, with one result per output."""

    results: tuple[str, ...]
    op: str
    args: tuple[str, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Scan:
    """A scan of `primitives.SCANS` along the row axes: one result per element."""

    result: str
    op: str
    args: tuple[str, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Check:
    """An index check, 0 <= value < limit; a kernel reports a violation."""

    value: str
    limit: Expr
    mask: str | None = None


@dataclass(frozen=True)
class Store:
    """`value` written to memory at `access`, converted to the param's dtype."""

    access: Access
    value: str


Statement: TypeAlias = Load | Index | Constant | Compute | Reduce | Scan | Check | Store


def results_of(s: Statement) -> tuple[str, ...]:
    """Return the names of the values that a statement defines."""
    if isinstance(s, Reduce):
        return s.results
    return () if isinstance(s, (Store, Check)) else (s.result,)


def values_in(value: Expr) -> list[str]:
    """Return the names of the integer values in an offset."""
    return sorted(s.name[1:] for s in value.free_symbols if s.name[0] == "%")


def needs_of(s: Statement) -> list[str]:
    """Return the names of the values that a statement uses."""
    if isinstance(s, (Compute, Reduce, Scan)):
        return list(s.args)
    if isinstance(s, (Load, Store)):
        value = [s.value] if isinstance(s, Store) else []
        mask = [s.access.mask] if s.access.mask else []
        return [*value, *values_in(s.access.offset), *mask]
    if isinstance(s, Check):
        return [s.value, *([s.mask] if s.mask else [])]
    return values_in(s.value) if isinstance(s, Index) else []


def axes_in(value: Expr) -> frozenset[str]:
    """Return the names of the axes in an index expression."""
    return frozenset(s.name[1:] for s in value.free_symbols if s.name[0] == "@")


def axes_of(value: Expr, varies: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """Return the names of the axes that an index expression depends on, also through loaded values.

    varies: as returned by `Kernel.varies_over`.
    """
    return axes_in(value).union(*(varies[v] for v in values_in(value)))


def axes_along(s: Statement, varies: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """Return the names of the axes along which what a statement makes varies, or where it is
    stored."""
    if isinstance(s, Store):
        return varies[s.value] | axes_of(s.access.offset, varies)
    names = (s.value,) if isinstance(s, Check) else results_of(s)
    return frozenset[str]().union(*(varies[n] for n in names))


def expressions_of(s: Statement) -> list[Expr]:
    """Return the positions and sizes in a statement."""
    if isinstance(s, (Load, Store)):
        return [s.access.offset]
    if isinstance(s, Index):
        return [s.value]
    return [s.limit] if isinstance(s, Check) else []


def phase_of(s: Statement, phases: Mapping[str, int]) -> int:
    """Return the first phase in which all inputs of a statement are known; see `Kernel.phases`."""
    return max((phases[a] for a in needs_of(s)), default=0)


def rename(s: Statement, names: Mapping[str, str]) -> Statement:
    """Return the statement with values renamed; the caller renames the symbols in offsets."""

    def new(name: str) -> str:
        return names.get(name, name)

    if isinstance(s, Reduce):
        return replace(s, results=tuple(map(new, s.results)), args=tuple(map(new, s.args)))
    if isinstance(s, (Compute, Scan)):
        return replace(s, result=new(s.result), args=tuple(map(new, s.args)))
    if isinstance(s, Check):
        return replace(s, value=new(s.value), mask=new(s.mask) if s.mask else None)
    if isinstance(s, (Load, Store)) and s.access.mask:
        s = replace(s, access=replace(s.access, mask=new(s.access.mask)))
    if isinstance(s, Store):
        return replace(s, value=new(s.value))
    return replace(s, result=new(s.result))


@dataclass(frozen=True)
class Kernel:
    """One fused kernel, independent of target and shape.

    sources: the ATen calls it computes, for the header of the printed source.
    """

    name: str
    params: tuple[Param, ...]
    axes: tuple[Axis, ...]
    body: tuple[Statement, ...]
    sources: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[Axis, ...]:
        """The parallel axes: one iteration computes one row of every output."""
        return tuple(a for a in self.axes if a.kind == PARALLEL)

    @property
    def columns(self) -> tuple[Axis, ...]:
        """The reduction axes, in order."""
        return tuple(a for a in self.axes if a.kind == REDUCTION)

    @property
    def sizes(self) -> tuple[str, ...]:
        """The names of the dims passed by value, sorted."""
        found: set[str] = set()
        for value in self.expressions():
            found |= {s.name for s in value.free_symbols if s.name[0] not in "@%"}
        return tuple(sorted(found))

    def expressions(self) -> Iterator[Expr]:
        """Yield every size expression in the kernel: extents, offsets, index values and limits."""
        yield from (axis.extent for axis in self.axes)
        for statement in self.body:
            yield from expressions_of(statement)

    def varies_over(self) -> dict[str, frozenset[str]]:
        """Return, for each value, the names of the axes that it varies over."""
        varies: dict[str, frozenset[str]] = {}
        reduced = frozenset(a.name for a in self.columns)
        for s in self.body:
            found = frozenset[str]().union(*map(axes_in, expressions_of(s)))
            found = found.union(*(varies[v] for v in needs_of(s)))
            if isinstance(s, (Reduce, Scan)):
                found = found - reduced if isinstance(s, Reduce) else found | reduced
            varies.update(dict.fromkeys(results_of(s), found))
        return varies

    def phases(self) -> dict[str, int]:
        """Return, for each value, the number of reductions on the longest dependency chain to
        it."""
        phases: dict[str, int] = {}
        for s in self.body:
            after = phase_of(s, phases) + isinstance(s, Reduce)
            phases.update(dict.fromkeys(results_of(s), after))
        return phases

    def digest(self) -> str:
        """Return a digest of the structure: kernels with equal digests are built once."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        shown = (self.params, self.axes, self.body)
        return hashlib.sha256(repr(shown).encode()).hexdigest()[:16]

    def __hash__(self) -> int:
        return hash(self._digest)
