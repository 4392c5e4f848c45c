"""Code: the code objects of a function and of the functions defined in it.

In: a code object. Out: it and those among its constants, at any depth, and the names that they
read::

    names_in(lambda: [EPS for _ in range(n)])  ->  "range", "n", "EPS"     # of its __code__
"""

from __future__ import annotations

import types
from collections.abc import Iterator


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a function's code, then that of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_in(constant)


def names_in(code: types.CodeType) -> Iterator[str]:
    """Yield the globals and attributes that a function's code and its nested code name."""
    for inner in codes_in(code):
        yield from inner.co_names
