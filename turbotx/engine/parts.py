"""Parts: submodules that are called by methods other than forward, or held by a wrapper.

In: a class and the names of an instance's submodules. Out: for each method, the submodules that its
code calls directly, past the model's own call, and whether it only passes its own call on to them::

    calls_of_parts(Autoencoder, model._modules)  ->  {"encode": {"encoder": False}}
    path_to_model(sentence_transformer)          ->  ("0", "model")
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterable
from typing import Any

from torch import nn

from turbotx.capture.code import names_in

RUNNING = ("generate", "encode", "decode", "predict", "embed", "score")
"""Prefixes of methods that compute; `set_adapter`, for example, does not."""


def calls_of_parts(cls: type, names: Iterable[str]) -> dict[str, dict[str, bool]]:
    """Return, per method, the submodules among `names` that it calls: `self.encoder(x)` or
    `self.encoder.forward(x)` (False), or only `self.encoder.encode(x)` in `encode` (True)."""
    wanted = frozenset(names)
    found: dict[str, dict[str, bool]] = {}
    if not wanted:
        return found
    for name in {n for base in cls.__mro__ if base not in nn.Module.__mro__ for n in vars(base)}:
        if name.startswith("__") or name == "forward":
            continue
        method = inspect.unwrap(inspect.getattr_static(cls, name, None))
        if isinstance(method, types.FunctionType) and not wanted.isdisjoint(
            names_in(method.__code__)
        ):
            called = _called(method, name, wanted)
            if called:
                found[name] = called
    return found


def _called(method: types.FunctionType, name: str, wanted: frozenset[str]) -> dict[str, bool]:
    """Return the attributes of its first argument that the method's code calls. What a generator
    or a coroutine passes on runs after its call, and counts as called."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, SyntaxError, TypeError):
        return {}  # no source: entered interactively or generated
    owner = method.__code__.co_varnames[:1]
    passed_on = {name, "forward"} if name.startswith(RUNNING) else {"forward"}
    later = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        called: Any = node.func if isinstance(node, ast.Call) else None
        passes = False
        if isinstance(called, ast.Attribute) and called.attr in passed_on:
            passes = called.attr != "forward" and not method.__code__.co_flags & later
            called = called.value
        if (
            isinstance(called, ast.Attribute)
            and isinstance(called.value, ast.Name)
            and (called.value.id,) == owner
            and called.attr in wanted
        ):
            found[called.attr] = passes and found.get(called.attr, True)
    return found


def path_to_model(module: nn.Module) -> tuple[str, ...]:
    """Return the path to the single submodule with weights inside a module that has none of its
    own, also through nested wrappers; () if there is no such submodule."""
    path: tuple[str, ...] = ()
    while not module._parameters and not module._buffers:
        held = {n: m for n, m in module._modules.items() if m is not None}
        heavy = [n for n, m in held.items() if next(m.parameters(), None) is not None]
        if len(heavy) != 1:
            break
        path, module = (*path, heavy[0]), held[heavy[0]]
    return path
