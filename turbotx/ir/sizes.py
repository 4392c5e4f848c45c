"""Sizes as plain data: Python source over a program's dims, compiled when needed.

In: texts, as printed by `expr.sizes_of`. Out: one function that evaluates all of them, in a few
tens of nanoseconds each; programs load and run without sympy::

    Sizes(("4 * seq + 32", "batch")).compile(["batch", "seq"])(2, 10)  ->  (72, 2)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from turbotx.ir.size_functions import PYTHON_NAMES

Evaluate = Callable[..., tuple[Any, ...]]
"""Evaluates several sizes from the values of a program's dims, in order."""


@dataclass(frozen=True)
class Sizes:
    """Texts of sizes: ints, or floats and bools computed from sizes by Python."""

    texts: tuple[str, ...]

    def compile(self, dims: Sequence[str]) -> Evaluate:
        """Return a function that maps the dims, in order, to a tuple of all values."""
        source = f"lambda {', '.join(dims)}: ({''.join(f'{text}, ' for text in self.texts)})"
        names = {**PYTHON_NAMES, "__builtins__": {}}
        return eval(compile(source, "<turbotx sizes>", "eval"), names)

    def that_use(self, dims: Sequence[str]) -> list[int]:
        """Return the places of the texts in which one of these dims is."""
        wanted = set(dims)
        used = (compile(text, "<turbotx sizes>", "eval").co_names for text in self.texts)
        return [k for k, names in enumerate(used) if wanted.intersection(names)]


def define(name: str, arguments: str, lines: Sequence[str]) -> Callable[..., Any]:
    """Return a function of Python's whose lines use sizes as texts do."""
    source = f"def {name}({arguments}):\n" + "".join(f"    {line}\n" for line in lines)
    errors = {e.__name__: e for e in (ArithmeticError, ValueError)}
    names: dict[str, Any] = {**PYTHON_NAMES, "divmod": divmod, "__builtins__": errors}
    exec(compile(source, "<turbotx sizes>", "exec"), names)
    made: Callable[..., Any] = names[name]
    return made
