"""Example: inputs for a saved model, whose file describes its inputs but not their values.

In: a module of `turbotx.load` and sizes by name. Out: arguments of the first kind of call that it
serves: random floats, and integers 0 and 1, which are valid for any token table::

    example_call(model, {"batch": 4})  ->  (), {"input_ids": ..., "attention_mask": ...}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree

from turbotx.errors import InputError
from turbotx.saved.load import SavedModule

USUAL = {"batch": 2, "seq": 16}
OTHER = 2
"""The size of a dim that is neither given, nor in USUAL, nor the batch of another input."""


def example_call(
    model: SavedModule, sizes: Mapping[str, int]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments at these sizes; with `past`, or of a file that has such calls alone, the
    call of a decoder with a cache that holds so many tokens.

    Raises InputError for a dim that the model does not have.
    """
    steps = "past" in sizes or not model.has_plain_calls
    if not steps:
        return _example_of(model, False, sizes)
    from transformers import DynamicCache  # such files need it

    past, seq = sizes.get("past", USUAL["seq"]), sizes.get("seq", 1)
    rest = {name: size for name, size in sizes.items() if name != "past"}
    cache: Any = DynamicCache()
    if past:
        _, before = _example_of(model, True, {**rest, "seq": past}, past)
        model(**_as_step(before, cache))
    _, kwargs = _example_of(model, True, {**rest, "seq": seq}, past + seq)
    return (), _as_step(kwargs, cache)


def _as_step(kwargs: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """Return a call of plain tensors as one with a cache."""
    if kwargs["kv_kind"] != "decoder":
        raise InputError("an example with past is for a decoder alone, and the file has an encoder")
    own = {name: value for name, value in kwargs.items() if not name.startswith("kv_")}
    return {**own, "past_key_values": cache}


def _example_of(
    model: SavedModule, steps: bool, sizes: Mapping[str, int], length: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments of the first call of a kind that the file has; length: of a step's cache."""
    (spec, described), call = model.table_of(steps).first()
    dims = example_dims(call.program.dims, sizes)
    dims |= {call.program.dims[k]: length for k in call.stepping}
    rules = iter(call.matcher.rules.inputs)
    generator = torch.Generator().manual_seed(0)
    leaves: list[Any] = []
    for kind in described:
        if kind == (float,):
            next(rules)
            leaves.append(1.0)
        elif isinstance(kind[0], torch.dtype):
            _, extents = next(rules)
            shape = [e.evaluate(*(dims[name] for name in e.dims))[0] for e in extents]
            leaves.append(_fill(kind[0], shape, generator).to(kind[1]))
        else:
            leaves.append(kind[1])
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return tuple(args), dict(kwargs)


def example_dims(known: Collection[str], sizes: Mapping[str, int]) -> dict[str, int]:
    """Return a size for every dim of a program; raise InputError for one that it does not have."""
    unknown = [name for name in sizes if name not in known and name not in USUAL]
    if unknown:
        raise InputError(f"no dim is called {unknown[0]!r}; this model's are {', '.join(known)}")
    batch = sizes.get("batch", USUAL["batch"])
    usual = {**USUAL, **{name: batch for name in known if name.endswith("_d0")}}
    return {name: sizes.get(name, usual.get(name, OTHER)) for name in known}


def _fill(dtype: torch.dtype, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=torch.float32, generator=generator).to(dtype)
    if dtype is torch.bool:
        return torch.ones(shape, dtype=dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)
