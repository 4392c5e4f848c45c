"""Kernel builder: scalar values during lowering, with constant folding and CSE.

In: the op table's rules, which write `x * b.sigmoid(x)` on `Element`s. Out: the statements of the
kernel's body; equal statements are emitted once, and constants are folded::

    b.index(row) >= 0  ->  True          True & mask  ->  mask
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, partialmethod
from typing import Any

import sympy
import torch

from turbotx import ir
from turbotx.ir.expr import ZERO, Expr, is_nonnegative
from turbotx.ir.primitives import COMPARISONS, PRIMITIVES, REDUCTIONS

Number = bool | int | float


@dataclass(frozen=True)
class Element:
    """One scalar value; `value` is set if it is a known constant, `index` if it is a known integer
    expression of loop indices."""

    machine: KernelBuilder
    name: str
    dtype: torch.dtype
    value: Number | None = None
    index: Expr | None = None

    @property
    def is_float(self) -> bool:
        """Whether the dtype is floating point."""
        return self.dtype.is_floating_point

    def _with(self, op: str, other: Any, swap: bool = False) -> Element:
        return self.machine.call(op, other, self) if swap else self.machine.call(op, self, other)

    __add__ = partialmethod(_with, "add")
    __radd__ = partialmethod(_with, "add", swap=True)
    __sub__ = partialmethod(_with, "sub")
    __rsub__ = partialmethod(_with, "sub", swap=True)
    __mul__ = partialmethod(_with, "mul")
    __rmul__ = partialmethod(_with, "mul", swap=True)
    __truediv__ = partialmethod(_with, "div")
    __rtruediv__ = partialmethod(_with, "div", swap=True)
    __lt__ = partialmethod(_with, "lt")
    __le__ = partialmethod(_with, "le")
    __gt__ = partialmethod(_with, "gt")
    __ge__ = partialmethod(_with, "ge")

    def __neg__(self) -> Element:
        return self.machine.call("neg", self)


class KernelBuilder:
    """Creates elements and the statements that compute them."""

    def __init__(self) -> None:
        self.body: list[ir.Statement] = []
        self._shared: dict[Any, Any] = {}
        self._counts: dict[str, int] = {}
        # Values that a half type holds exactly, and what was rounded to be one.
        self._held: dict[str, torch.dtype] = {}
        self._before: dict[str, Element] = {}

    def bounds(self, value: Expr) -> tuple[Expr | None, Expr | None]:
        """Return the minimum and maximum of an index expression, None where unknown."""
        raise NotImplementedError

    # --- creating ---

    def _name(self, base: str) -> str:
        k = self._counts.get(base, 0)
        self._counts[base] = k + 1
        return f"{base}{k}" if k or base[-1].isdigit() else base

    def _once(
        self, key: Any, base: str, make: Callable[[str], ir.Statement], dtype: torch.dtype,
        value: Number | None = None, index: Expr | None = None,
    ) -> Element:  # fmt: skip
        """Return the element of a statement that `make` makes of its result's name, the same one
        for equal keys."""
        if key not in self._shared:
            name = self._name(base)
            self.body.append(make(name))
            self._shared[key] = Element(self, name, dtype, value, index)
        return self._shared[key]

    def constant(self, value: Number, dtype: torch.dtype) -> Element:
        """Return a literal in the compute dtype of `dtype`."""
        dtype = compute_dtype(dtype)
        if dtype is torch.bool:
            value = bool(value)
        elif dtype.is_floating_point:
            value = float(value)
        else:
            value = int(value)
        index = sympy.Integer(value) if dtype is torch.int64 else None
        key, make = ("constant", repr(value), dtype), partial(ir.Constant, value=value, dtype=dtype)
        return self._once(key, "c", make, dtype, value, index)

    def index(self, value: Expr) -> Element:
        """Return an int64 element equal to an expression of loop indices and sizes."""
        value = sympy.expand(value)
        if value.is_Integer:
            return self.constant(int(value), torch.int64)
        make = partial(ir.Index, value=value)
        return self._once(("index", value), "i", make, torch.int64, index=value)

    def emit_load(self, access: ir.Access, stored: torch.dtype) -> Element:
        """Return the element at `access` in the compute dtype of `stored`."""
        dtype = compute_dtype(stored)
        base = "x" if dtype.is_floating_point else "k"
        make = partial(ir.Load, access=access, dtype=dtype)
        found = self._once(("load", access), base, make, dtype)
        if stored in HALVES:
            self._held[found.name] = stored
        return found

    def emit_reduce(self, op: str, value: Element) -> tuple[Element, ...]:
        """Return a reduction's outputs over the row axes; op: a name in `primitives.REDUCTIONS`."""
        key = ("reduce", op, value.name)
        if key not in self._shared:
            names = tuple(self._name(base) for base in REDUCTIONS[op].outputs)
            self.body.append(ir.Reduce(names, op, (value.name,), value.dtype))
            self._shared[key] = tuple(Element(self, n, value.dtype) for n in names)
            if op in ("max", "min") and value.name in self._held:
                self._held[names[0]] = self._held[value.name]
        return self._shared[key]

    def emit_scan(self, op: str, value: Element) -> Element:
        """Return a scan along the row axes; op: a name in `primitives.SCANS`."""
        make = partial(ir.Scan, op=op, args=(value.name,), dtype=value.dtype)
        return self._once(("scan", op, value.name), f"running_{op}", make, value.dtype)

    def reduce_one(self, op: str, value: Element) -> tuple[Element, ...]:
        """Return a reduction over a single element."""
        if op == "welford":
            return value, self.constant(0, value.dtype)
        if op == "softmax":
            return value, self.exp(value - value)
        return (value,)

    # --- vocabulary of the rules ---

    def call(self, op: str, *args: Any) -> Element:
        """Apply primitive `op` to elements and numbers; a number takes the elements' dtype."""
        like = next(a for a in args if isinstance(a, Element))
        dtype = like.dtype
        if op == "where":
            dtype = next((a.dtype for a in args[1:] if isinstance(a, Element)), torch.float32)
        elements = tuple(a if isinstance(a, Element) else self.constant(a, dtype) for a in args)
        folded = self._fold(op, elements)
        if folded is not None:
            return folded
        result = torch.bool if op in COMPARISONS else dtype
        key = (op, tuple(e.name for e in elements))
        if key not in self._shared:
            name = self._name(op if op not in _RESERVED else f"{op}_")
            self.body.append(ir.Compute(name, op, tuple(e.name for e in elements), result))
            self._shared[key] = Element(self, name, result)
            if op in _CHOICES:
                chosen = elements[op == "where" :]
                kinds = {self._held[e.name] for e in chosen if e.name in self._held}
                if kinds and all(self._holds(e, kind) for e in chosen for kind in kinds):
                    self._held[name] = kinds.pop()
        return self._shared[key]

    def rounded(self, x: Element, dtype: torch.dtype) -> Element:
        """Return what memory of `dtype` keeps of a value that is computed in float32; x itself
        where that is no half type, or holds it.

        The digits that it has more stay inside of arithmetic of its own dtype: what decides by
        values (a comparison, a rounding to whole numbers) and what converts asks for this.
        """
        if dtype not in HALVES or x.dtype is not torch.float32 or self._holds(x, dtype):
            return x
        found = self.call(str(dtype).removeprefix("torch."), x)
        self._held[found.name], self._before[found.name] = dtype, x
        return found

    def _holds(self, x: Element, dtype: torch.dtype) -> bool:
        if x.value is not None:
            return float(torch.tensor(float(x.value)).to(dtype)) == x.value
        return self._held.get(x.name) is dtype

    def before_store(self, x: Element, dtype: torch.dtype) -> Element:
        """Return the value to store for x in memory of `dtype`; the store does the rounding."""
        return self._before.get(x.name, x) if self._held.get(x.name) is dtype else x

    exp = partialmethod(call, "exp")
    tanh = partialmethod(call, "tanh")
    erf = partialmethod(call, "erf")
    sigmoid = partialmethod(call, "sigmoid")

    def round_to_int8(self, x: Element) -> Element:
        """Return x, float32 from -127.5 to 127.5, rounded to int8, halves to even."""
        make = partial(ir.Compute, op="round_to_int8", args=(x.name,), dtype=torch.int8)
        return self._once(("round_to_int8", x.name), "rounded", make, torch.int8)

    def where(self, condition: Element, x: Any, y: Any) -> Element:
        """Return x where `condition` is nonzero, else y, in the dtype of x."""
        if isinstance(x, Element) and isinstance(y, Element) and x.dtype != y.dtype:
            y = self.cast(y, x.dtype)
        return self.call("where", self.truth(condition), x, y)

    def truth(self, x: Element) -> Element:
        """Return x as bool: x itself if it is bool, otherwise x != 0."""
        return x if x.dtype is torch.bool else self.call("ne", x, 0)

    def constant_of(self, x: Any) -> Number | None:
        """Return the constant value of x, None if it is only known at run time."""
        return x.value if isinstance(x, Element) else x

    def compute_dtype(self, node: Any) -> torch.dtype:
        """Return the dtype in which a node's elements are computed: float32 for half types."""
        return compute_dtype(node.meta["val"].dtype)

    def cast(self, x: Element, dtype: torch.dtype) -> Element:
        """Convert as PyTorch does: truncate to integers, != 0 to bool; half types become
        float32."""
        dtype = compute_dtype(dtype)
        if x.dtype is dtype:
            return x
        if x.value is not None and not (x.value != x.value or abs(x.value) == float("inf")):
            return self.constant(x.value, dtype)
        if dtype is torch.bool:
            return self.truth(x)
        make = partial(ir.Compute, op="cast", args=(x.name,), dtype=dtype)
        index = x.index if dtype is torch.int64 else None
        return self._once(("cast", x.name, dtype), "cast", make, dtype, index=index)

    # --- folding ---

    def _fold(self, op: str, args: tuple[Element, ...]) -> Element | None:
        if op in ("and", "or") and args[0].dtype is torch.bool:
            for known, other in (args, args[::-1]):
                if known.value is not None:
                    return other if known.value is (op == "and") else known
        if op == "where" and args[0].value is not None:
            return args[1] if args[0].value else args[2]
        if op == "not" and args[0].dtype is torch.bool and args[0].value is not None:
            return self.constant(not args[0].value, torch.bool)
        if op in ("mul", "div") and args[1].value == 1 and args[1].value is not False:
            return args[0]
        if op == "mul" and args[0].value == 1 and args[0].value is not True:
            return args[1]
        if all(a.index is not None for a in args):
            return self._fold_index(op, [a.index for a in args])
        if all(a.value is not None for a in args) and op != "cast":
            return self._fold_constants(op, args)
        return None

    def _fold_index(self, op: str, args: list[Expr]) -> Element | None:
        if op == "add":
            return self.index(args[0] + args[1])
        if op == "sub":
            return self.index(args[0] - args[1])
        if op == "neg":
            return self.index(-args[0])
        if op == "mul" and any(not _has_position(a) for a in args):
            return self.index(args[0] * args[1])
        orders = {"ge": (0, 1, 0), "gt": (0, 1, 1), "le": (1, 0, 0), "lt": (1, 0, 1)}
        if op in orders:
            a, b, margin = orders[op]
            difference = sympy.expand(args[a] - args[b] - margin)
            low, high = self.bounds(difference)
            if low is not None and is_nonnegative(low):
                return self.constant(True, torch.bool)
            if high is not None and is_nonnegative(-1 - high):
                return self.constant(False, torch.bool)
        if op in ("eq", "ne") and args[0] == args[1]:
            return self.constant(op == "eq", torch.bool)
        return None

    def _fold_constants(self, op: str, args: tuple[Element, ...]) -> Element | None:
        dtype = torch.bool if op in COMPARISONS else args[-1].dtype
        values = [torch.tensor(a.value, dtype=a.dtype) for a in args]
        try:
            return self.constant(PRIMITIVES[op].meaning(*values).item(), dtype)
        except RuntimeError:  # for example integer division by zero: left to the kernel
            return None


HALVES = (torch.float16, torch.bfloat16)
_CHOICES = {"maximum", "minimum", "neg", "abs", "where"}
"""Primitives whose result is one of their arguments, or its sign turned."""
_RESERVED = {"and", "or", "xor", "not", "where", "cast"}


def _has_position(value: Expr) -> bool:
    return any(s.name[0] in "@%" for s in value.free_symbols)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of `dtype` are computed: float32 for half types."""
    return torch.float32 if dtype in HALVES else dtype


__all__ = ["ZERO", "Element", "KernelBuilder", "compute_dtype"]
