"""Signature: which sizes a capture serves.

In: a `Captured` and the shapes of a call's tensors. Out: the values of its dims, or None and the
reason why the capture does not hold for them, for example::

    match([(2, 17), (2, 17)])  ->  (2, 17, 2)      # batch, seq, attention_mask_d0
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from turbotx.capture import Captured
from turbotx.sizes import evaluate


class SizeMatcher:
    """Solves a call's shapes for the captured dims, and checks what tracing assumed."""

    def __init__(self, captured: Captured) -> None:
        self._captured = captured

    def match(self, shapes: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
        """Return the dims' values in order, or None where the capture does not hold."""
        dims, failed = self._solve(shapes)
        return None if failed else tuple(dims[name] for name in self._captured.dims)

    def explain(self, shapes: Sequence[Sequence[int]]) -> str:
        """Return why `match` gives None, in words."""
        return self._solve(shapes)[1]

    def _solve(self, shapes: Sequence[Sequence[int]]) -> tuple[dict[str, int], str]:
        captured = self._captured
        dims: dict[str, int] = {}
        later = []
        for name, sizes, shape in zip(
            captured.input_names, captured.input_sizes, shapes, strict=True
        ):
            for d, (size, actual) in enumerate(zip(sizes, shape, strict=True)):
                if size.is_Symbol:
                    if dims.setdefault(size.name, actual) != actual:
                        return dims, f"{name}.shape[{d}] is {actual}, not {size}={dims[size.name]}"
                else:
                    later.append((name, d, size, actual))
        for name, d, size, actual in later:
            unknown = [s for s in size.free_symbols if s.name not in dims]
            if len(unknown) == 1:
                solved = sympy.solve(size - actual, unknown[0])
                if len(solved) != 1 or not solved[0].is_Integer:
                    return dims, f"{name}.shape[{d}] is {actual}, which is no {size}"
                dims[unknown[0].name] = int(solved[0])
            if evaluate(size, dims) != actual:
                return dims, f"{name}.shape[{d}] is {actual}, not {size}"
        return dims, self._broken_guard(dims)

    def _broken_guard(self, dims: dict[str, int]) -> str:
        for guard in self._captured.guards:
            for least in (0, guard.least):
                values = {s: max(least, dims[s.name]) for s in guard.condition.free_symbols}
                numbers = {s: sympy.Integer(v) for s, v in values.items()}
                if guard.condition.xreplace(numbers) != False:  # noqa: E712
                    break
            else:
                return f"{guard.text} does not hold"
        return ""
