"""torchao weights: reads the integers and scales that torchao's `quantize_` leaves in a model.

In: a parameter. Out: int8 rows with a scale each, and whether the activations stay float; None for
other tensors, and for kinds that turbotx cannot compute with::

    read_int8(model.up.weight)  ->  Int8Rows(numbers, scale, float_rows=True)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

STATIC = ("quant_scale", "quant_zero_point", "pre_scale")


@dataclass(frozen=True)
class Int8Rows:
    """numbers: int8 (n, k). scale: float32 (n, 1). float_rows: whether only the weights are
    int8."""

    numbers: torch.Tensor
    scale: torch.Tensor
    float_rows: bool


def is_torchao(tensor: object) -> bool:
    """Return whether a tensor is torchao's int8, supported or not; torchao is not imported."""
    cls = type(tensor)
    return cls.__name__ == "Int8Tensor" and cls.__module__.partition(".")[0] == "torchao"


def read_int8(tensor: Any) -> Int8Rows | None:
    """Return a weight's integers and scales, without copying the integers."""
    if not is_torchao(tensor) or why_not(tensor):
        return None
    scale = tensor.scale.reshape(-1, 1).float()
    return Int8Rows(tensor.qdata, scale, tensor.act_quant_kwargs is None)


def join_int8(tensors: Sequence[Any]) -> Int8Rows | None:
    """Concatenate the integers and scales of several weights by rows; None if one is unsupported.
    float_rows: of the first."""
    given = [read_int8(tensor) for tensor in tensors]
    sure = [rows for rows in given if rows is not None]
    if not sure or len(sure) < len(given):
        return None
    numbers, scale = torch.cat([r.numbers for r in sure]), torch.cat([r.scale for r in sure])
    return Int8Rows(numbers, scale, sure[0].float_rows)


def why_not(tensor: Any) -> str:
    """Return why turbotx cannot compute with torchao's int8 weight, "" if it can."""
    rows, asked = tensor.qdata, tensor.act_quant_kwargs
    if rows.dtype is not torch.int8 or rows.dim() != 2 or not rows.is_contiguous():
        return f"it holds {rows.dtype} of {tuple(rows.shape)}"
    if tensor.scale.numel() != rows.shape[0] or list(tensor.block_size) != [1, rows.shape[1]]:
        return f"it has a scale for every {tuple(tensor.block_size)}, not for every row"
    shift = getattr(tensor, "zero_point", None)
    if shift is not None and bool(shift.any()):
        return "its integers are shifted by a zero point"
    if any(getattr(tensor, f"act_{name}", None) is not None for name in STATIC):
        return "it takes activations by scales of its own"
    if asked is not None and (
        type(asked.granularity).__name__ != "PerRow"
        or asked.mapping_type.name != "SYMMETRIC"
        or getattr(asked, "reduce_range", False)
    ):
        return f"it takes activations by {asked}"
    return ""


_MARK = "_turbotx_float_rows"


def stand_in(parameter: Any) -> nn.Parameter:
    """Return a float parameter that stands for an int8 weight in a trace, and is marked as such."""
    rows = read_int8(parameter)
    assert rows is not None
    made = nn.Parameter(parameter.dequantize(), parameter.requires_grad)
    setattr(made, _MARK, rows.float_rows)
    return made


def stand_ins(model: nn.Module) -> dict[str, bool]:
    """Return the parameters of a model that stand for int8 ones, by path, with whether only the
    weights are int8."""
    named = model.named_parameters()
    return {path: getattr(p, _MARK) for path, p in named if hasattr(p, _MARK)}
