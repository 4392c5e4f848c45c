"""Models as torchao's `quantize_` leaves them: by torchao where it is installed, and by a stand-in.

In: a model, how. Out: the same with int8 or int4 weights, tensors of a class of their own that
computes by its own code::

    quantize("stand-in", model, float_rows=True)
    quantize_int4("IntxUnpackedToInt8Tensor", model)
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from turbotx.ir.int4_ops import group_scale, quantize_groups, unpack_int4
from turbotx.ir.quantized_ops import quantize_rows, row_scale

WAYS = ("torchao", "stand-in")


class Int8Tensor(torch.Tensor):
    """What torchao 0.18 calls so, as far as turbotx looks at it."""

    qdata: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(
        cls, qdata: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, asked: Any
    ) -> Any:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, qdata.shape, dtype=dtype, device=qdata.device
        )
        made.qdata, made.scale, made.block_size = qdata, scale, [1, qdata.shape[1]]
        made.zero_point, made.act_quant_kwargs = torch.zeros_like(scale, dtype=torch.int8), asked
        made.act_quant_scale = made.act_quant_zero_point = made.act_pre_scale = None
        return made

    def __init__(self, *args: Any) -> None:
        pass

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]
        return (self.qdata * self.scale).to(self.dtype)

    def __tensor_flatten__(self) -> Any:
        return ["qdata", "scale"], (self.dtype, self.act_quant_kwargs)

    @staticmethod
    def __tensor_unflatten__(inner: Any, said: Any, size: Any, stride: Any) -> Any:
        return Int8Tensor(inner["qdata"], inner["scale"], *said)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            own = args[0]
            return cls(own.qdata, own.scale, own.dtype, own.act_quant_kwargs)
        plain = [a.dequantize() if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


Int8Tensor.__module__ = "torchao.quantization"


def quantize(way: str, model: nn.Module, float_rows: bool) -> nn.Module:
    """Quantise every `nn.Linear` of a model in place, and return it."""
    if way == "torchao":
        ao = pytest.importorskip("torchao.quantization")
        config = ao.Int8WeightOnlyConfig if float_rows else ao.Int8DynamicActivationInt8WeightConfig
        ao.quantize_(model, config())
        return model
    per_row = type("PerRow", (), {})()
    asked = SimpleNamespace(granularity=per_row, mapping_type=SimpleNamespace(name="SYMMETRIC"))
    for linear in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        weight = linear.weight.detach()
        scale = row_scale(weight)
        made = Int8Tensor(
            quantize_rows(weight, scale), scale, weight.dtype, None if float_rows else asked
        )
        linear.weight = nn.Parameter(made, requires_grad=False)
    return model


class Int4Tensor(torch.Tensor):
    """A weight of torchao's int4 that the test says how to dequantise: of its plain classes, as far
    as turbotx looks at them."""

    held: dict[str, Any]

    @staticmethod
    def __new__(cls, shape: Any, dtype: torch.dtype, held: dict[str, Any], floats: Any) -> Any:
        place = held["qdata"].device
        made: Any = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=place)
        made.held, made.floats = held, floats
        for name, value in held.items():
            setattr(made, name, value)
        return made

    def __init__(self, *args: Any) -> None:
        pass

    def __tensor_flatten__(self) -> Any:
        return [n for n, v in self.held.items() if isinstance(v, torch.Tensor)], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            own = args[0]
            return cls(own.shape, own.dtype, own.held, own.floats)
        plain = [a.floats() if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


class IntxUnpackedToInt8Tensor(Int4Tensor):
    """A number a byte, scales and zero points by (n, groups)."""


Int4Tensor.__module__ = IntxUnpackedToInt8Tensor.__module__ = "torchao.quantization"
INT4_WAYS = ("Int4Tensor", "IntxUnpackedToInt8Tensor", "torchao opaque", "torchao intx")


def quantize_int4(way: str, model: nn.Module, group: int = 32) -> nn.Module:
    """Quantise every `nn.Linear` of a model in place to int4 with zero points, and return it."""
    if way.startswith("torchao"):
        ao = pytest.importorskip("torchao.quantization")
        if way == "torchao opaque":
            int4 = pytest.importorskip("torchao.prototype.quantization.int4")
            ao.quantize_(model, int4.PrototypeInt4WeightOnlyConfig(group_size=group))
        else:
            how = {"weight_dtype": torch.int4, "granularity": ao.PerGroup(group)}
            ao.quantize_(
                model, ao.IntxWeightOnlyConfig(**how, mapping_type=ao.MappingType.ASYMMETRIC)
            )
        return model
    for linear in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        linear.weight = nn.Parameter(_int4(way, linear.weight.detach(), group), requires_grad=False)
    return model


def _int4(way: str, weight: torch.Tensor, group: int) -> torch.Tensor:
    both = group_scale(weight, group, True)
    numbers = unpack_int4(quantize_groups(weight, both, group))
    scale, offset = both.to(weight.dtype).unbind(-1)
    held: dict[str, Any] = {"block_size": [1, group]}
    if way == "Int4Tensor":
        low, high = numbers[:, ::2] & 15, numbers[:, 1::2] << 4
        held |= {"qdata": low | high, "scale": scale.t(), "zero_point": offset.t()}
        held |= {"activation_dtype": torch.bfloat16, "act_pre_scale": None}
        shift = offset
    else:
        shift = (-offset / scale).round()
        held |= {"qdata": numbers, "scale": scale, "zero_point": shift.to(torch.int8)}
        held |= {"target_dtype": torch.int4, "activation_quantization": None}
        shift = -shift * scale

    def floats() -> torch.Tensor:
        parts = numbers.unflatten(1, (-1, group)) * scale[..., None] + shift[..., None]
        return parts.flatten(1).to(weight.dtype)

    cls = Int4Tensor if way == "Int4Tensor" else IntxUnpackedToInt8Tensor
    return cls(weight.shape, weight.dtype, held, floats)
