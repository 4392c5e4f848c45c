"""Fake results: what an op gives for fake tensors, computed once for arguments of equal sizes.

In: an op and its arguments. Out: its fake result; equal layers of a model ask the same, and a
symbolic computation of sizes takes milliseconds::

    fake_result(aten.linear.default, (x, weight), {}, mode)  ->  FakeTensor(batch, seq, 384)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.symbol import SymT, symbol_is_type

_results: weakref.WeakKeyDictionary[ShapeEnv, dict[Any, FakeTensor]]
_results = weakref.WeakKeyDictionary()
_PLAIN = frozenset(
    (
        int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout,
        torch.memory_format,
    )
)  # fmt: skip
_OF_NEW_MEMORY = ("turbotx.ir.attention_ops",)
"""Where functions lie that stand for ops, have no schema, and make memory of their own."""
_VALUES = ("constant", "_item_memo", "_nonzero_memo", "_unique_memo", "_unique_consecutive_memo")
"""What PyTorch, up to 2.13, keeps with a fake tensor of the numbers in it."""
_BY_VALUES = (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)
_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)


def fake_result(
    target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], mode: FakeTensorMode
) -> Any:
    """Return what a call of fake tensors gives. Results of equal calls may be one object, where the
    op makes memory of its own."""
    shape_env = mode.shape_env
    key = None if shape_env is None else _key(target, args, kwargs)
    known = None if key is None or shape_env is None else _results.setdefault(shape_env, {})
    if known is not None and key in known:
        return known[key]
    # Composite ops written in C++ would look at symbolic sizes and fix them to the example's.
    with mode, enable_python_dispatcher(), torch.no_grad():
        made = target(*args, **kwargs)
    if known is not None and isinstance(made, FakeTensor) and made.constant is None:
        with suppress(UnknownError):
            if is_sized_by(describe(made), key):
                known[key] = made
    return made


class UnknownError(Exception):
    """An argument is none that can be told from others."""


def _key(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what makes two calls equal; None where they are not to be one."""
    if getattr(target, "__module__", "") not in _OF_NEW_MEMORY:
        returns = getattr(getattr(target, "_schema", None), "returns", ())
        if not returns or any(r.alias_info is not None for r in returns):
            return None
    try:
        return target, describe_arguments(args, kwargs)
    except UnknownError:
        return None


def describe_arguments(
    args: Sequence[Any], kwargs: Mapping[str, Any], mode: FakeTensorMode | None = None
) -> Any:
    """Return what tells a call's arguments from others. mode: see `describe`, which raises
    UnknownError."""
    named = tuple((name, describe(x, mode)) for name, x in sorted(kwargs.items()))
    return tuple(describe(x, mode) for x in args), named


def describe(value: Any, mode: FakeTensorMode | None = None) -> Any:
    """Return what tells a call's argument from others: for a tensor how it lies, not where.

    mode: whose tensors are taken, all by default. Raises UnknownError for one that says more than
    that, as a constant does, and for objects of other kinds.
    """
    if type(value) in _PLAIN:
        return type(value), value
    if isinstance(value, FakeTensor):
        if any(getattr(value, name, None) is not None for name in _VALUES) or value.is_conj():
            raise UnknownError
        if value.layout is not torch.strided or value.is_neg():
            raise UnknownError
        if mode is not None and value.fake_mode is not mode:
            raise UnknownError
        numbers = (*value.shape, *value.stride(), value.storage_offset())
        return (
            value.dtype, value.device, value.dim(), value.requires_grad,
            tuple(n if type(n) is int else n.node.expr for n in numbers),
        )  # fmt: skip
    if isinstance(value, _SIZES):
        return type(value), value.node.expr
    if isinstance(value, (list, tuple)):
        return tuple(describe(x, mode) for x in value)
    raise UnknownError


def is_sized_by(made: Any, key: Any) -> bool:
    """Return whether a described result has the sizes of its arguments, none of them by values."""
    given = _symbols(key)
    return _symbols(made) <= given and not any(symbol_is_type(s, _BY_VALUES) for s in given)


def _symbols(described: Any) -> set[Any]:
    if isinstance(described, sympy.Basic):
        return set(described.free_symbols)
    if isinstance(described, tuple):
        return set().union(*map(_symbols, described))
    return set()
