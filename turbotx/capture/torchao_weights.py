"""torchao weights: reads the integers and scales that torchao's `quantize_` leaves in a model.

In: a parameter. Out: integers of int8 with a scale a row, or of int4 with one a group, as
`ir.quantized_ops` has them, and whether what they are multiplied by stays float; None for other
tensors, and those that no product of turbotx computes::

    read_integers(model.up.weight)  ->  Integers(numbers, scale, Scheme(float_rows=True))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from turbotx.errors import CaptureError
from turbotx.ir.int4_ops import OCTET, dequantize_groups, pack_int4
from turbotx.ir.quantized_ops import Scheme

Read = tuple[torch.Tensor, torch.Tensor]
STATIC = ("quant_scale", "quant_zero_point", "pre_scale")


@dataclass(frozen=True)
class Integers:
    """A weight's integers and scales, as its scheme has them."""

    numbers: torch.Tensor
    scale: torch.Tensor
    scheme: Scheme


def is_torchao(tensor: object) -> bool:
    """Return whether a tensor is of a class of torchao that is known here, supported or not;
    torchao is not imported."""
    cls = type(tensor)
    return cls.__name__ in _REASONS and cls.__module__.partition(".")[0] == "torchao"


def scheme_of(tensor: Any) -> Scheme | None:
    """Return how a tensor is quantised by torchao, or stands for one that is; None for others, and
    those that no product of turbotx computes with."""
    if not is_torchao(tensor):
        return getattr(tensor, _MARK, None)
    if why_not(tensor):
        return None
    if type(tensor).__name__ == "Int8Tensor":
        return Scheme(tensor.act_quant_kwargs is None)
    return Scheme(float_rows=True, group=int(tensor.block_size[1]), shifted=True)


def read_integers(tensor: Any) -> Integers | None:
    """Return what a weight of torchao holds; integers of int8 without a copy."""
    scheme = scheme_of(tensor) if is_torchao(tensor) else None
    return None if scheme is None else Integers(*_READ[type(tensor).__name__](tensor), scheme)


def parts_of(tensor: Any) -> tuple[torch.Tensor, ...]:
    """Return the plain tensors that a weight of torchao holds."""
    names = ("qdata", "scale", "zero_point", "scale_and_zero")
    return tuple(t for t in (getattr(tensor, n, None) for n in names) if t is not None)


def floats_of(tensor: Any) -> torch.Tensor:
    """Return what a readable weight stands for, in its dtype."""
    found = read_integers(tensor)
    assert found is not None
    if found.scheme.group:
        wide = dequantize_groups(found.numbers, found.scale, tensor.shape[1])
    else:
        wide = found.numbers * found.scale
    return wide.to(tensor.dtype)


def join_integers(tensors: Sequence[Any]) -> Integers | None:
    """Return the integers and scales of several weights as those of one, by rows; None where one
    is not of such a kind. scheme: of the first."""
    given = [read_integers(tensor) for tensor in tensors]
    sure = [rows for rows in given if rows is not None]
    if not sure or len(sure) < len(given):
        return None
    numbers, scale = torch.cat([r.numbers for r in sure]), torch.cat([r.scale for r in sure])
    return Integers(numbers, scale, sure[0].scheme)


def why_not(tensor: Any) -> str:
    """Return what no product of turbotx does about torchao's weight, "" where one does it."""
    return _REASONS[type(tensor).__name__](tensor)


# --- int8, a scale a row ---


def _int8_reason(tensor: Any) -> str:
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


def _read_int8(tensor: Any) -> Read:
    return tensor.qdata, tensor.scale.reshape(-1, 1).float()


# --- int4, a scale and an offset a group ---


def _groups_reason(tensor: Any) -> str:
    size = list(tensor.block_size)
    if len(tensor.shape) != 2 or len(size) != 2 or size[0] != 1:
        return f"it has a scale for every {tuple(size)} of {tuple(tensor.shape)}"
    if size[1] % OCTET or tensor.shape[1] % size[1]:
        return f"its groups are of {size[1]} inputs of {tensor.shape[1]}, no multiple of {OCTET}"
    if getattr(tensor, "act_pre_scale", None) is not None:
        return "it scales its activations"
    return ""


def _int4_reason(tensor: Any) -> str:
    if tensor.activation_dtype is not torch.bfloat16 or tensor.qdata.dim() != 2:
        return f"it takes activations as {tensor.activation_dtype}"
    return _groups_reason(tensor)


def _read_int4(tensor: Any) -> Read:
    """Of the format "plain": (n, k/2), even k in the low half of a byte; w = q scale + zero_point,
    both (groups, n)."""
    low, high = tensor.qdata & 15, tensor.qdata >> 4
    numbers = torch.stack([low, high], -1).flatten(-2)
    return _in_groups(numbers, tensor.scale.t(), tensor.zero_point.t())


def _opaque_reason(tensor: Any) -> str:
    if tensor.act_mapping_type is not None:
        return f"it takes activations as {tensor.act_mapping_type} int8"
    if getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None) is None:
        return "this PyTorch does not pack such weights"
    return _groups_reason(tensor)


def _read_opaque(tensor: Any) -> Read:
    """Of what PyTorch's int4 product on CPUs reads: w = (q - 8) scale + zero; scale and zero by
    (groups, n, 2). Its layout is the processor's: what is unpacked is packed again and compared."""
    rows, depth = tensor.shape
    repack = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default  # private
    for width, halves in ((64, True), (32, True), (64, False), (32, False), (16, False)):
        numbers = _unpack_blocks(tensor.qdata.reshape(rows, depth // 2), width, halves)
        if torch.equal(repack(numbers.int(), 1), tensor.qdata):
            scale, zero = tensor.scale_and_zero.transpose(0, 1).unbind(-1)
            return _in_groups(numbers.to(torch.int8) - 8, scale, zero)
    raise CaptureError(
        f"a weight of {rows} x {depth} int4 numbers has the layout of another processor or "
        "another PyTorch: quantize the model on this machine"
    )


def _unpack_blocks(packed: torch.Tensor, width: int, halves: bool) -> torch.Tensor:
    """Return (n, k) numbers from 0 to 15 of blocks of `width` rows, in which each k has its rows'
    numbers. Two of a byte are of neighbouring rows, or in blocks of full width of both halves."""
    parts = []
    for block in packed.split(width):
        apart = halves and len(block) == width
        some = block.reshape(packed.shape[1] * 2, -1)
        numbers = torch.stack([some & 15, some >> 4], 1 if apart else 2)
        parts.append(numbers.flatten(1).t())
    return torch.cat(parts)


def _intx_reason(tensor: Any) -> str:
    if str(tensor.target_dtype) != "torch.int4":
        return f"it holds {tensor.target_dtype}"
    if tensor.activation_quantization is not None:
        return f"it takes activations as {tensor.activation_quantization}"
    return _groups_reason(tensor)


def _read_intx(tensor: Any) -> Read:
    """Of a number a byte: w = (q - zero_point) scale, both (n, groups)."""
    scale, shift = tensor.scale.float(), tensor.zero_point.float()
    return _in_groups(tensor.qdata, scale, -shift * scale)


def _in_groups(numbers: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> Read:
    both = torch.stack([scale.float(), offset.float()], -1)
    return pack_int4(numbers), both.contiguous()


_REASONS = {
    "Int8Tensor": _int8_reason, "Int4Tensor": _int4_reason, "Int4OpaqueTensor": _opaque_reason,
    "IntxUnpackedToInt8Tensor": _intx_reason,
}  # fmt: skip
_READ = {
    "Int8Tensor": _read_int8, "Int4Tensor": _read_int4, "Int4OpaqueTensor": _read_opaque,
    "IntxUnpackedToInt8Tensor": _read_intx,
}  # fmt: skip

# --- traces ---

_MARK = "_turbotx_scheme"


def stand_in(parameter: Any) -> nn.Parameter:
    """Return floats for a trace to be given in the place of a weight of integers, which say that
    they are such."""
    made = nn.Parameter(floats_of(parameter), parameter.requires_grad)
    setattr(made, _MARK, scheme_of(parameter))
    return made


def stand_ins(model: nn.Module) -> dict[str, Scheme]:
    """Return, by path, the parameters of a model that stand for integers: how those are scaled."""
    named = model.named_parameters()
    return {path: getattr(p, _MARK) for path, p in named if hasattr(p, _MARK)}
