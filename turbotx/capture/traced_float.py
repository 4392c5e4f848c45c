"""Traced floats: makes a Python float among a call's arguments an input of its program.

In: a number and the 0-d tensor that holds it in the trace. Out: a stand-in for the number in the
user's code: arithmetic on it is traced; code that needs its value (a branch on it, math.sqrt) gets
it, and the capture then serves only that value::

    x * scale  ->  mul(x, scale.to(float32));    if scale > 0.5: ...  ->  scale is read
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partialmethod
from typing import Any

import torch

Tensor: Any = torch.Tensor


@dataclass(frozen=True)
class FloatInput:
    """A float input of a program: its index among the inputs, the value that it must have if the
    model's Python code read it, and whether it was used as a divisor."""

    place: int
    fixed: float | None
    nonzero: bool

    @property
    def is_particular(self) -> bool:
        """Whether it does not serve every number."""
        return self.fixed is not None or self.nonzero

    def takes(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether the capture serves a call's float, read from the call's `tensors`: equal
        to the value that the trace read, and not 0 if it was used as a divisor."""
        if not self.is_particular:
            return True
        value = float(tensors[self.place].item())
        fits = self.fixed is None or value.hex() == self.fixed.hex()
        return fits and (value != 0.0 or not self.nonzero)


def describe_floats(floats: Sequence[FloatInput]) -> str:
    """Describe the numbers that a program serves."""
    told = [
        f"{'not 0.0' if x.fixed is None else x.fixed!r} (input {x.place})"
        for x in floats
        if x.is_particular
    ]
    return " and ".join(told)


class TracedFloat:
    """A float whose value a trace need not know; `isinstance(x, float)` holds.

    reads: collects the indices of the inputs whose value was read. nonzero: of those used as
    divisors, for which Python raises at 0.0.
    """

    __slots__ = ("_is_input", "_nonzero", "_places", "_reads", "_tensor", "_value")

    def __init__(
        self, value: float, tensor: torch.Tensor, places: frozenset[int], reads: set[int],
        nonzero: set[int], is_input: bool = True,
    ) -> None:  # fmt: skip
        self._value, self._tensor, self._places = value, tensor, places
        self._reads, self._nonzero, self._is_input = reads, nonzero, is_input

    __class__ = property(lambda self: float)

    def read(self) -> float:
        """Return the number and record the read: the trace then serves this value only."""
        self._reads |= self._places
        return self._value

    def _made(self, value: float, tensor: torch.Tensor, places: frozenset[int]) -> TracedFloat:
        return TracedFloat(value, tensor, places, self._reads, self._nonzero, False)

    # --- arithmetic ---

    def _with(self, other: Any, compute: Callable[[Any, Any], Any], flipped: bool) -> Any:
        if isinstance(other, torch.Tensor):
            return NotImplemented  # the tensor's operator is called next
        traced = type(other) is TracedFloat
        if not traced and type(other) not in (int, float):
            return compute(other, self.read()) if flipped else compute(self.read(), other)
        places = self._places | (other._places if traced else frozenset())
        values, tensors = [self._value], [self._tensor]
        values.append(other._value if traced else float(other))
        # As a tensor: division of a scalar by a tensor uses its reciprocal.
        tensors.append(other._tensor if traced else torch.full_like(self._tensor, float(other)))
        if flipped:
            values.reverse()
            tensors.reverse()
        return self._made(compute(*values), compute(*tensors), places)

    __add__ = partialmethod(_with, compute=operator.add, flipped=False)
    __radd__ = partialmethod(_with, compute=operator.add, flipped=True)
    __sub__ = partialmethod(_with, compute=operator.sub, flipped=False)
    __rsub__ = partialmethod(_with, compute=operator.sub, flipped=True)
    __mul__ = partialmethod(_with, compute=operator.mul, flipped=False)
    __rmul__ = partialmethod(_with, compute=operator.mul, flipped=True)

    def __truediv__(self, other: Any) -> Any:
        if type(other) is TracedFloat and not other._is_nonzero():
            return self.read() / other.read()
        return self._with(other, operator.truediv, False)

    def __rtruediv__(self, other: Any) -> Any:
        if isinstance(other, torch.Tensor) or self._is_nonzero():
            return self._with(other, operator.truediv, True)
        return other / self.read()

    def _is_nonzero(self) -> bool:
        """Return whether it can be a divisor: only if it is an input itself, which every call can
        check."""
        if self._is_input and self._value:
            self._nonzero |= self._places
        return self._is_input and bool(self._value)

    def __neg__(self) -> TracedFloat:
        return self._made(-self._value, -self._tensor, self._places)

    def __pos__(self) -> TracedFloat:
        return self

    def __abs__(self) -> TracedFloat:
        return self._made(abs(self._value), self._tensor.abs(), self._places)

    # --- PyTorch functions ---

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        rule = None if kwargs else _RULES.get(func)
        if rule is not None:
            found = rule(func, args)
            if found is not NotImplemented:
                return found
        return func(*read_floats(args), **read_floats(kwargs or {}))


class FloatReads:
    """What one trace assumes of the floats among a call's arguments.

    fixed: pass the plain numbers, for models whose calls accept nothing else.
    """

    def __init__(self) -> None:
        self.fixed = False
        self._reads: set[int] = set()
        self._nonzero: set[int] = set()

    def begin(self) -> None:
        """Clear the records before a trace."""
        self._reads.clear()
        self._nonzero.clear()

    def make(self, value: float, tensor: torch.Tensor, place: int) -> float | TracedFloat:
        """Return the stand-in for a number in the trace. place: the index of its tensor among the
        inputs."""
        if self.fixed:
            self._reads.add(place)
            return value
        return TracedFloat(value, tensor, frozenset((place,)), self._reads, self._nonzero)

    def describe(self, place: int, value: float) -> FloatInput:
        """Return what the trace assumed of the float at an index among the inputs."""
        fixed = value if place in self._reads else None
        return FloatInput(place, fixed, place in self._nonzero)


def read_floats(value: Any) -> Any:
    """Replace traced floats in arguments by their numbers, at any depth."""
    if type(value) is TracedFloat:
        return value.read()
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        made = [read_floats(v) for v in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if isinstance(value, Mapping):
        return {k: read_floats(v) for k, v in value.items()}
    return value


def _result(tensor: torch.Tensor) -> torch.dtype | None:
    """Return the dtype of an op of a tensor and a Python float; None unless it is float32, float64
    or the tensor's own bfloat16 or float16."""
    found = torch.result_type(tensor, 1.0)
    if found in (torch.float32, torch.float64):
        return found
    return found if found == tensor.dtype and found in (torch.bfloat16, torch.float16) else None


def _arithmetic(func: Any, args: tuple[Any, ...]) -> Any:
    """Compute x * number in at least float32, rounded to x's dtype, as PyTorch does."""
    if len(args) != 2 or not any(isinstance(a, torch.Tensor) for a in args):
        return NotImplemented
    tensor = next(a for a in args if isinstance(a, torch.Tensor))
    dtype = _result(tensor)
    if dtype is None:
        return NotImplemented
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    result = func(*(a._tensor.to(wide) if type(a) is TracedFloat else a for a in args))
    in_place = result.dtype == tensor.dtype
    return result if in_place or result.dtype == dtype else result.to(dtype)


def _same_dtype(func: Any, args: tuple[Any, ...]) -> Any:
    """Convert the number to x's dtype in x > number, where(c, x, number) and x.masked_fill(m,
    number)."""
    tensors = [a for a in args if isinstance(a, torch.Tensor) and a.dtype is not torch.bool]
    if len(tensors) != 1:
        return NotImplemented
    dtype = _result(tensors[0])
    if dtype is None or (func in _FILLS and dtype != tensors[0].dtype):
        return NotImplemented
    return func(*(a._tensor.to(dtype) if type(a) is TracedFloat else a for a in args))


_FILLS = (torch.masked_fill, Tensor.masked_fill, Tensor.masked_fill_)
_RULES: dict[Any, Callable[[Any, tuple[Any, ...]], Any]] = {
    **dict.fromkeys(
        (
            torch.add, torch.sub, torch.mul, torch.div, torch.true_divide, torch.rsub,
            torch.multiply, torch.divide, torch.subtract,
            Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, Tensor.true_divide,
            Tensor.multiply, Tensor.divide, Tensor.subtract,
            Tensor.__add__, Tensor.__radd__, Tensor.__sub__, Tensor.__rsub__, Tensor.__mul__,
            Tensor.__rmul__, Tensor.__truediv__, Tensor.__rtruediv__, Tensor.__rdiv__,
            Tensor.__iadd__, Tensor.__isub__, Tensor.__imul__, Tensor.__itruediv__,
            Tensor.add_, Tensor.sub_, Tensor.mul_, Tensor.div_,
        ),
        _arithmetic,
    ),
    **dict.fromkeys(
        (
            torch.gt, torch.lt, torch.ge, torch.le, torch.eq, torch.ne,
            Tensor.gt, Tensor.lt, Tensor.ge, Tensor.le, Tensor.eq, Tensor.ne,
            Tensor.__gt__, Tensor.__lt__, Tensor.__ge__, Tensor.__le__, Tensor.__eq__,
            Tensor.__ne__, torch.where, *_FILLS,
        ),
        _same_dtype,
    ),
}  # fmt: skip


def _reader(name: str) -> Callable[..., Any]:
    """Return a method that reads the number and applies float's method to it."""
    own = getattr(float, name)

    def method(self: TracedFloat, *args: Any) -> Any:
        if any(isinstance(a, torch.Tensor) for a in args):
            return NotImplemented
        return own(self.read(), *read_floats(args))

    return method


for _name in (
    "__bool__", "__float__", "__int__", "__trunc__", "__round__", "__floor__", "__ceil__",
    "__hash__", "__str__", "__repr__", "__format__", "__eq__", "__ne__", "__lt__", "__le__",
    "__gt__", "__ge__", "__pow__", "__rpow__", "__mod__", "__rmod__", "__floordiv__",
    "__rfloordiv__", "__divmod__", "__rdivmod__", "is_integer", "hex", "as_integer_ratio",
    "conjugate",
):  # fmt: skip
    setattr(TracedFloat, _name, _reader(_name))
del _name
