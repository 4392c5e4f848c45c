"""Shape matcher: binds a call's sizes to dims and checks a capture's size guards.

In: the expressions of the inputs' sizes and the guards, as plain data, and the shapes of a call's
tensors. Out: the values of the capture's dims, or None and the reason why the capture does not
apply::

    match([(2, 17), (2, 17)])  ->  (2, 17, 2)      # batch, seq, attention_mask_d0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from turbotx.ir.sizes import Evaluate, Sizes, define


@dataclass(frozen=True)
class InputSize:
    """The size of one dim of an input.

    dims: the capture's dims in its expression. solve: (dim, slope, rest) if the size is slope * dim
    + rest, so that it determines the dim; otherwise None. shown: the text for messages.
    """

    size: Sizes
    dims: tuple[str, ...]
    solve: tuple[str, int, int] | None
    shown: str

    @cached_property
    def evaluate(self) -> Evaluate:
        """The size as a compiled function of the dims' values."""
        return self.size.compile(self.dims)


@dataclass(frozen=True)
class SizeGuard:
    """A condition on the dims that held while tracing; `text` is shown if it fails."""

    condition: Sizes
    dims: tuple[str, ...]
    text: str

    @cached_property
    def evaluate(self) -> Evaluate:
        """The condition as a compiled function of the dims' values."""
        return self.condition.compile(self.dims)


@dataclass(frozen=True)
class SizeRules:
    """What a capture assumed of sizes. inputs: the name and sizes of each input, in order."""

    dims: tuple[str, ...]
    inputs: tuple[tuple[str, tuple[InputSize, ...]], ...]
    guards: tuple[SizeGuard, ...]


@dataclass(frozen=True)
class _Broken:
    """Why a capture does not apply: in words, and the dims or the single place at fault."""

    why: str
    dims: frozenset[str] = frozenset()
    place: tuple[int, int] | None = None


class ShapeMatcher:
    """Solves a call's shapes for the captured dims, and checks the conditions assumed while
    tracing."""

    def __init__(self, rules: SizeRules) -> None:
        self.rules = rules

    def match(self, shapes: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
        """Return the dims' values in order, or None where the capture does not hold."""
        found: tuple[int, ...] | None = self._match(shapes)
        return found

    @cached_property
    def _match(self) -> Any:
        """`_solve` of these rules as one function of Python's, without words: a step of a decoder
        comes with new sizes every time."""
        sizes = [
            (f"x{i}_{d}", size)
            for i, (_, sizes) in enumerate(self.rules.inputs)
            for d, size in enumerate(sizes)
        ]
        unpacked = "".join(
            f"({''.join(f'x{i}_{d}, ' for d in range(len(sizes)))}), "
            for i, (_, sizes) in enumerate(self.rules.inputs)
        )
        lines, known = [f"[{unpacked}] = shapes"], set[str]()
        plain = [(x, s.solve[0]) for x, s in sizes if s.solve and s.solve[1:] == (1, 0)]
        for x, name in plain:
            lines.append(f"if {x} != {name}: return" if name in known else f"{name} = {x}")
            known.add(name)
        later = [(x, s) for x, s in sizes if not s.solve or s.solve[1:] != (1, 0)]
        for x, size in later:
            if size.solve is not None and size.solve[0] not in known:
                name, slope, rest = size.solve
                lines += [f"{name}, over = divmod({x} - {rest}, {slope})", "if over: return"]
                known.add(name)
        if not known.issuperset(self.rules.dims):
            return lambda shapes: None
        lines += [f"if ({size.size.texts[0]}) != {x}: return" for x, size in later]
        lines += [f"if {name} < 1: return" for name in self.rules.dims]
        for guard in self.rules.guards:
            texts = " and ".join(f"({text})" for text in guard.condition.texts)
            lines += ["try:", f"    if not ({texts}): return"]
            lines += ["except (ArithmeticError, ValueError): return"]
        lines.append(f"return ({''.join(f'{name}, ' for name in self.rules.dims)})")
        return define("match", "shapes", lines)

    def explain(self, shapes: Sequence[Sequence[int]]) -> str:
        """Describe why `match` returns None; "" if it returns dims."""
        broken = self._solve(shapes)[1]
        return broken.why if broken is not None else ""

    def find_deciding(self, shapes: Sequence[Sequence[int]]) -> set[tuple[int, int]]:
        """Return the dims, as (tensor, dim), whose sizes make `match` return None."""
        broken = self._solve(shapes)[1]
        if broken is None:
            return set()
        found = {broken.place} if broken.place is not None else set()
        for i, (_, sizes) in enumerate(self.rules.inputs):
            found |= {(i, d) for d, s in enumerate(sizes) if broken.dims.intersection(s.dims)}
        return found

    def _solve(self, shapes: Sequence[Sequence[int]]) -> tuple[dict[str, int], _Broken | None]:
        dims: dict[str, int] = {}
        later: list[tuple[tuple[int, int], InputSize, int]] = []
        for i, ((_, sizes), shape) in enumerate(zip(self.rules.inputs, shapes, strict=True)):
            for d, (size, actual) in enumerate(zip(sizes, shape, strict=True)):
                # A size that is itself a dim determines it directly; others come after.
                if size.solve is not None and size.solve[1:] == (1, 0):
                    name = size.solve[0]
                    if dims.setdefault(name, actual) != actual:
                        return dims, self._differs((i, d), actual, f"{name}={dims[name]}")
                else:
                    later.append(((i, d), size, actual))
        for place, size, actual in later:
            if size.solve is not None and size.solve[0] not in dims:
                name, slope, rest = size.solve
                if (actual - rest) % slope:
                    return dims, self._differs(place, actual, size.shown)
                dims[name] = (actual - rest) // slope
        unknown = [name for name in self.rules.dims if name not in dims]
        if unknown:
            return dims, _Broken(f"{', '.join(unknown)} does not follow from the inputs' sizes")
        for place, size, actual in later:
            if size.evaluate(*(dims[name] for name in size.dims)) != (actual,):
                return dims, self._differs(place, actual, size.shown)
        return dims, self._find_broken_guard(dims)

    def _differs(self, place: tuple[int, int], actual: int, wanted: str) -> _Broken:
        name, sizes = self.rules.inputs[place[0]]
        why = f"{name}.shape[{place[1]}] is {actual}, not {wanted}"
        return _Broken(why, frozenset(sizes[place[1]].dims), place)

    def _find_broken_guard(self, dims: dict[str, int]) -> _Broken | None:
        for name in self.rules.dims:
            if dims[name] < 1:
                why = f"{name} is {dims[name]}; a call with a size of 0 has a capture of its own"
                return _Broken(why)
        for guard in self.rules.guards:
            try:
                holds = all(guard.evaluate(*(dims[name] for name in guard.dims)))
            except (ArithmeticError, ValueError):  # a size that the model does not accept
                holds = False
            if not holds:
                return _Broken(f"{guard.text} does not hold", frozenset(guard.dims))
        return None
