"""Fake results: cached results of ops on fake tensors, for arguments of equal sizes.

In: an op and its arguments. Out: its fake result. Equal layers of a model ask for the same result,
and computing symbolic sizes takes milliseconds::

    fake_result(aten.linear.default, (x, weight), {}, mode)  ->  FakeTensor(batch, seq, 384)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.symbol import SymT, symbol_is_type

_results: dict[ShapeEnv, dict[Any, FakeTensor]] = {}
_PLAIN = frozenset(
    (
        int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout,
        torch.memory_format,
    )
)  # fmt: skip
_OF_NEW_MEMORY = ("turbotx.ir.attention_ops",)
"""Modules of functions used as ops without a schema, whose results do not alias their inputs."""
_VALUES = ("constant", "_item_memo", "_nonzero_memo", "_unique_memo", "_unique_consecutive_memo")
"""Attributes in which PyTorch, up to 2.13, stores known values of a fake tensor."""
BY_VALUES = (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)
_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)


def fake_result(
    target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], mode: FakeTensorMode
) -> Any:
    """Return the result of a call with fake tensors. Equal calls may share one result object if the
    op does not alias its inputs."""
    shape_env = mode.shape_env
    key = None if shape_env is None else _key(target, args, kwargs)
    known = None if key is None or shape_env is None else _results.setdefault(shape_env, {})
    if known is not None and key in known:
        return known[key]
    # Without it, composite ops written in C++ would specialize symbolic sizes to the example's.
    with mode, enable_python_dispatcher(), torch.no_grad():
        made = target(*args, **kwargs)
    if known is not None and isinstance(made, FakeTensor) and made.constant is None:
        with suppress(UnknownError):
            if is_sized_by(describe(made), key):
                known[key] = made
    return made


def forget_results() -> None:
    """Empty the cache. A result refers to its environment, also by its sizes and by what it is a
    view of, both from C++: neither a weak table nor the environment itself could own the cache."""
    _results.clear()


class UnknownError(Exception):
    """An argument that has no description."""


def _key(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the cache key of a call; None if it must not be cached."""
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
    """Return a key of a call's arguments.

    mode: see `describe`, which raises UnknownError.
    """
    named = tuple((name, describe(x, mode)) for name, x in sorted(kwargs.items()))
    return tuple(describe(x, mode) for x in args), named


def describe(value: Any, mode: FakeTensorMode | None = None) -> Any:
    """Return a key of a call's argument: for a tensor its metadata, not its identity.

    mode: require this mode of fake tensors; any by default. Raises UnknownError for a tensor with
    known values, and for objects of other types.
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
    """Return whether a described result depends on sizes of its arguments only, not on values."""
    given = _symbols(key)
    return _symbols(made) <= given and not any(symbol_is_type(s, BY_VALUES) for s in given)


def _symbols(described: Any) -> set[Any]:
    if isinstance(described, sympy.Basic):
        return set(described.free_symbols)
    if isinstance(described, tuple):
        return set().union(*map(_symbols, described))
    return set()
