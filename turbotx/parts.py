"""Parts: which methods of a model's class call its submodules without calling the model.

In: a class and the names of an instance's submodules. Out: for each method the submodules that its
code calls, which nobody sees who only replaces the call of the model::

    calls_of_parts(Autoencoder, model._modules)  ->  {"encode": ["encoder"]}
"""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from torch import nn


def calls_of_parts(cls: type, names: Iterable[str]) -> dict[str, list[str]]:
    """Return, by method, the submodules among `names` that the method calls: `self.encoder(x)`, or
    `self.encoder.encode(x)` in `encode`, or `self.encoder.forward(x)`."""
    wanted = frozenset(names)
    found: dict[str, list[str]] = {}
    if not wanted:
        return found
    for name in {n for base in cls.__mro__ if base not in nn.Module.__mro__ for n in vars(base)}:
        if name.startswith("__") or name == "forward":
            continue
        method = inspect.unwrap(inspect.getattr_static(cls, name, None))
        if isinstance(method, types.FunctionType) and wanted & set(method.__code__.co_names):
            called = _called(method.__code__, name, wanted)
            if called:
                found[name] = called
    return found


def _called(code: Any, method: str, wanted: frozenset[str]) -> list[str]:
    """Return which attributes of its first argument the code calls."""
    if not code.co_argcount:
        return []
    owner, found = code.co_varnames[0], []
    steps = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "PUSH_NULL")]
    for k, (load, attribute) in enumerate(pairwise(steps)):
        last = load.argval[-1] if isinstance(load.argval, tuple) else load.argval
        if not load.opname.startswith("LOAD_FAST") or last != owner:
            continue
        if attribute.argval in wanted and attribute.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            after = steps[k + 2]
            delegated = _is_method_load(after) and after.argval in (method, "forward")
            if _is_method_load(attribute) or delegated:
                found.append(attribute.argval)
    return list(dict.fromkeys(found))


def _is_method_load(step: dis.Instruction) -> bool:
    """Tell an attribute that is loaded to be called: Python 3.12 has one instruction for both."""
    return step.opname == "LOAD_METHOD" or (
        step.opname == "LOAD_ATTR" and "NULL" in (step.argrepr or "")
    )
