"""Leaks: finds fake tensors and symbolic sizes that a trace left in the user's objects.

In: a model, arguments, any object. Out: the paths to objects of a trace in it; there are none after
a capture, whether or not it succeeded, for example::

    find_leaks({"kept": [FakeTensor(...)]}, "state")  ->  ["state['kept'][0]: FakeTensor"]

The search follows the references that Python's garbage collector follows, through any container,
object, closure and cache, except what all programs share: Python modules, library classes, code.
"""

from __future__ import annotations

import gc
import types
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from turbotx.capture.code import names_in

TRACED = (FakeTensor, torch.SymInt, torch.SymFloat, torch.SymBool, fx.Proxy)

_PASSED_BY = (types.ModuleType, types.CodeType, types.FrameType, FakeTensorMode, fx.Graph, fx.Node)
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""Types of constants, which refer to nothing."""


def find_leaks(root: Any, name: str = "", most: int = 10, limit: int = 300_000) -> list[str]:
    """Return the paths below `root` to objects of a trace, at most `most`.

    Visits at most `limit` objects, breadth first. Of a function's globals, only those that its code
    names are visited; turbotx's own objects, which hold graphs, are skipped.
    """
    found: list[str] = []
    seen = {id(root)}
    queue: list[tuple[Any, str]] = [(root, name)]
    for value, path in queue:  # the queue grows meanwhile
        if isinstance(value, TRACED):
            found.append(f"{path}: {type(value).__name__}")
            if len(found) >= most:
                return found
            continue
        for step, inner in _inside(value):
            if id(inner) in seen or isinstance(inner, PLAIN):
                continue
            if len(seen) >= limit:
                return found
            seen.add(id(inner))
            queue.append((inner, path + step))
    return found


def _inside(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, _PASSED_BY) or (isinstance(value, type) and _is_shared(value)):
        return []
    # A class of an extension may have a descriptor in place of its module's name.
    if str(type(value).__module__).startswith("turbotx.") and not isinstance(value, nn.Module):
        return []
    if type(value) is dict or isinstance(value, dict):
        items = list(dict.items(value))
        return [(f"[{k!r}]" if isinstance(k, str) else "[key]", x) for k, x in items] + [
            (".key", k) for k, _ in items
        ]
    if isinstance(value, (list, tuple)):
        return [(f"[{k}]", x) for k, x in enumerate(value)]
    if isinstance(value, types.FunctionType):
        named = [n for n in names_in(value.__code__) if n in value.__globals__]
        steps: list[tuple[str, Any]] = [(f" -> {n}", value.__globals__[n]) for n in named]
        parts = (value.__closure__, value.__defaults__, value.__kwdefaults__, value.__dict__)
        return steps + [("", part) for part in parts if part]
    return [("." if isinstance(x, dict) else "", x) for x in gc.get_referents(value)]


def _is_shared(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in ("builtins", "torch", "numpy", "sympy", "turbotx")
