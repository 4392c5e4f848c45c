"""Signature: which sizes a capture serves.

In: a `Captured` and the shapes of a call's tensors. Out: the values of its dims, or None and the
reason why the capture does not hold for them, for example::

    match([(2, 17), (2, 17)])  ->  (2, 17, 2)      # batch, seq, attention_mask_d0
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from turbotx.capture.trace import Captured
from turbotx.ir.expr import Expr, compile_evaluator, evaluate


@dataclass(frozen=True)
class _Broken:
    """Why a capture does not hold: in words, and the sizes or the one place that it is about."""

    why: str
    symbols: frozenset[sympy.Basic] = frozenset()
    place: tuple[int, int] | None = None


class ShapeMatcher:
    """Solves a call's shapes for the captured dims, and checks what tracing assumed."""

    def __init__(self, captured: Captured) -> None:
        self._captured = captured

    def match(self, shapes: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
        """Return the dims' values in order, or None where the capture does not hold."""
        dims, broken = self._solve(shapes)
        return tuple(dims[name] for name in self._captured.dims) if broken is None else None

    def explain(self, shapes: Sequence[Sequence[int]]) -> str:
        """Return why `match` gives None, in words; "" where it gives dims."""
        broken = self._solve(shapes)[1]
        return broken.why if broken is not None else ""

    def find_deciding(self, shapes: Sequence[Sequence[int]]) -> set[tuple[int, int]]:
        """Return the dims, as (tensor, dim), whose sizes are why `match` gives None."""
        broken = self._solve(shapes)[1]
        if broken is None:
            return set()
        found = {broken.place} if broken.place is not None else set()
        for i, sizes in enumerate(self._captured.input_sizes):
            found |= {(i, d) for d, s in enumerate(sizes) if s.free_symbols & broken.symbols}
        return found

    def _solve(self, shapes: Sequence[Sequence[int]]) -> tuple[dict[str, int], _Broken | None]:
        captured = self._captured
        dims: dict[str, int] = {}
        later: list[tuple[tuple[int, int], Expr, int]] = []
        for i, (sizes, shape) in enumerate(zip(captured.input_sizes, shapes, strict=True)):
            for d, (size, actual) in enumerate(zip(sizes, shape, strict=True)):
                if size.is_Symbol:
                    if dims.setdefault(size.name, actual) != actual:
                        return dims, self._differs((i, d), actual, f"{size}={dims[size.name]}")
                else:
                    later.append(((i, d), size, actual))
        for place, size, actual in later:
            unknown = [s for s in size.free_symbols if s.name not in dims]
            if len(unknown) == 1:
                solved = sympy.solve(size - actual, unknown[0])
                if len(solved) != 1 or not solved[0].is_Integer:
                    return dims, self._differs(place, actual, str(size))
                dims[unknown[0].name] = int(solved[0])
            if evaluate(size, dims) != actual:
                return dims, self._differs(place, actual, str(size))
        return dims, self._find_broken_guard(dims)

    def _differs(self, place: tuple[int, int], actual: int, wanted: str) -> _Broken:
        name = self._captured.input_names[place[0]]
        why = f"{name}.shape[{place[1]}] is {actual}, not {wanted}"
        return _Broken(why, self._captured.input_sizes[place[0]][place[1]].free_symbols, place)

    def _find_broken_guard(self, dims: dict[str, int]) -> _Broken | None:
        for name in self._captured.dims:
            if dims[name] < 1:
                why = f"{name} is {dims[name]}; a call with a size of 0 has a capture of its own"
                return _Broken(why)
        for guard, holds in zip(self._captured.guards, self._holding, strict=True):
            try:
                held = holds(*(dims[name] for name in self._captured.dims))[0]
            except (ArithmeticError, ValueError):  # no size that the model takes
                held = False
            if not held:
                symbols = frozenset(guard.condition.free_symbols)
                return _Broken(f"{guard.text} does not hold", symbols)
        return None

    @functools.cached_property
    def _holding(self) -> list[Callable[..., tuple[Any, ...]]]:
        """Return a function of the dims for each guard: in Python, as the model's code asks."""
        dims = self._captured.dims
        return [compile_evaluator([guard.condition], dims) for guard in self._captured.guards]
