"""Cache argument: finds the key/value cache of transformers among a call's arguments.

In: a call. Out: its arguments by name without the cache, and the cache; `{}, None` if there is
none::

    split_cache((ids,), {"past_key_values": cache}, names)  ->  {"input_ids": ids}, cache
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from turbotx.errors import InputError

ARGUMENT = "past_key_values"


def split_cache(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Callable[[], Sequence[str]]
) -> tuple[dict[str, Any], Any]:
    """Return a call's arguments by name without its cache, and the cache; {} and None if there is
    none.

    names: returns the names of forward's positional arguments; called only when needed.
    """
    cache = kwargs.get(ARGUMENT)
    if cache is None and len(args) > 1 and any(map(_is_cache, args)):
        cache = _name_all(args, kwargs, names()).get(ARGUMENT)
    if cache is None or not _is_cache(cache):
        return {}, None
    given = _name_all(args, kwargs, names() if args else ())
    del given[ARGUMENT]
    return given, cache


def _name_all(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """Return all arguments by name."""
    if len(args) > len(names):
        raise InputError("pass the arguments of a call with a key/value cache by keyword")
    return {**dict(zip(names, args, strict=False)), **kwargs}


@functools.cache
def names_of(cls: Any) -> list[str]:
    """Return the names of the positional arguments of a model's forward, without `self`."""
    parameters = inspect.signature(cls.forward).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]


def _is_cache(value: Any) -> bool:
    """Return whether a value is a transformers `Cache`; transformers is not imported for the
    check."""
    module: Any = sys.modules.get("transformers.cache_utils")
    return module is not None and isinstance(value, module.Cache)


def is_new_cache(cls: type) -> bool:
    """Return whether `new_cache` can make a cache of this class."""
    return cls.__module__ == "transformers.cache_utils" and cls.__name__ in (
        "DynamicCache", "EncoderDecoderCache",
    )  # fmt: skip


def new_cache(cls: Any, model: Any) -> Any:
    """Return an empty cache of class `cls`, as the model would make it."""
    config = model.config
    if cls.__name__ == "DynamicCache":
        return cls(config=config)
    dynamic: Any = sys.modules[cls.__module__].DynamicCache
    return cls(dynamic(config=config), dynamic(config=config))
