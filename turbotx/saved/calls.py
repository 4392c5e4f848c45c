"""Calls: the functions that a saved program may call, by name.

In: an op of PyTorch, or one of turbotx's functions that occur in graphs. Out: its name, and the
reverse; only registered PyTorch ops and the functions below can be looked up::

    encode_target(torch.ops.aten.cat.default)  ->  "aten.cat.default"
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from turbotx.errors import SavedFileError, SaveError
from turbotx.ir import cache_ops, packed_ops, quantized_ops
from turbotx.ir.attention_ops import attention, attention_scores, attention_values
from turbotx.ir.expert_ops import grouped_linear, route
from turbotx.program.folded_weights import (
    fold_scales,
    fold_shift,
    fold_sums,
    fold_weight,
    join_affine,
)

assert cache_ops and packed_ops and quantized_ops  # imported to register ops

# The functions in graphs that are not PyTorch ops.
OWN: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem, "attention": attention,
    "attention_scores": attention_scores, "attention_values": attention_values,
    "grouped_linear": grouped_linear, "route": route,
    "fold_weight": fold_weight, "fold_scales": fold_scales, "fold_sums": fold_sums,
    "fold_shift": fold_shift, "join_affine": join_affine,
    "packed_attention": packed_ops.packed_attention, "sequence_sum": packed_ops.sequence_sum,
    "sequence_max": packed_ops.sequence_max, "sequence_token": packed_ops.sequence_token,
    "sequence_cumsum": packed_ops.sequence_cumsum,
}  # fmt: skip


def encode_target(target: Any) -> str:
    """Return an op's name; raise SaveError for a function that is not a registered op."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    for name, known in OWN.items():
        if target is known:
            return name
    raise SaveError(f"{target} cannot be saved: it is no op that PyTorch finds by name")


def decode_target(name: str) -> Callable[..., Any]:
    """Return the op of a name; raise SavedFileError if this version of PyTorch has none."""
    if name in OWN:
        return OWN[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except (AttributeError, RuntimeError) as error:
        raise SavedFileError(f"torch {torch.__version__} has no op {name}") from error
    if not isinstance(found, torch._ops.OpOverload):
        raise SavedFileError(f"{name} is no op of PyTorch")
    return found
