"""Call keys: the cheap dictionary key by which a compiled variant is looked up for a call.

In: a call's arguments and the ambient state. Out: a key for one kind of call at one shape, and a
signature that selects the captures that may serve it; neither contains the value of a float::

    describe_call((ids,), {"scale": 0.5}, ambient)  ->  (ambient, 1, "scale", shape, ..., float)
"""

from __future__ import annotations

from typing import Any

import torch

from turbotx.capture.ambient import DECISIVE, Ambient
from turbotx.capture.arguments import PLAIN, Structure, carry, describe_leaf, is_float
from turbotx.capture.composition import is_dense
from turbotx.ir.memory_order import expanded_dims, memory_order

_STRIDED = torch.strided


def describe_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], ambient: Ambient
) -> tuple[Any, list[torch.Tensor]]:
    """Return a call's key, built in one pass, and its tensors in order.

    The key is None if an argument is neither a strided tensor nor a plain constant.
    """
    parts: list[Any] = [ambient, len(args), *kwargs]
    tensors = []
    floats = False
    for value in (*args, *kwargs.values()):
        if is_dense(value):
            if value.layout is not _STRIDED or value.is_nested:
                return None, []  # the slow path raises the error
            plain = value.is_contiguous()
            order = None if plain else (memory_order(value), expanded_dims(value))
            parts += (value.shape, value.dtype, value.device, order)
            tensors.append(value)
        elif type(value) in PLAIN:
            parts += (type(value), value)
        elif is_float(value):
            parts.append(float)
            tensors.append(value)  # becomes a tensor once the device is known
            floats = True
        else:
            return None, []
    return tuple(parts), carry(tensors) if floats else tensors


def describe_kind(kwargs: dict[str, Any], ambient: Ambient) -> tuple[Any, list[torch.Tensor]]:
    """Return the part of a keyword call's key that excludes tensor sizes, and the call's tensors.
    The key is None if an argument is neither a tensor nor a plain constant."""
    parts: list[Any] = [ambient, *kwargs]
    tensors = []
    for value in kwargs.values():
        if is_dense(value):
            order = None if value.is_contiguous() else memory_order(value)
            parts += (value.dim(), value.dtype, value.device, order)
            tensors.append(value)
        elif type(value) in PLAIN:
            parts += (type(value), value)
        else:
            return None, []
    return tuple(parts), tensors


def make_signature(leaves: list[Any], spec: Structure, ambient: Ambient) -> Any:
    """Return the key that selects a capture: everything except tensor sizes and the ambient
    settings that only some traces read."""
    return (spec, tuple(map(describe_leaf, leaves)), ambient[:DECISIVE])
