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
    """Return arguments at these sizes; raise InputError for a dim that the model does not have."""
    (spec, described), call = model.first_call()
    dims = example_dims(call.program.dims, sizes)
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
