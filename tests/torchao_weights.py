"""Models as torchao's `quantize_` leaves them: by torchao where it is installed, and by a stand-in.

In: a model, how. Out: the same with int8 weights, tensors of a class of their own that computes by
its own code::

    quantize("stand-in", model, float_rows=True)
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

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
        made: Any = torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=dtype)
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
