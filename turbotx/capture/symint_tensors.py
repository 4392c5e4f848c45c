"""Size tensors: keeps sizes that a model stores in tensors symbolic while it is traced.

In: calls such as torch.tensor(x.shape[1]) and arithmetic on their results. Out: the same calls; the
size in such a tensor is recorded, so that its `.item()`, and its use as a slice bound or an extent,
is an expression over the traced sizes and not an unknown number::

    span = torch.tensor(x.shape[1]);  table[512 - span : 512 + span]  ->  table[512 - s : 512 + s]

The same hook refuses a torch.Generator, which a graph would hold as a constant.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from turbotx.errors import CaptureError

Tensor: Any = torch.Tensor

_MAKERS = (torch.tensor, torch.as_tensor, torch.scalar_tensor)


def _flipped(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: function(b, a)


_ARITHMETIC: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), operator.add),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), operator.sub),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), operator.mul),
    **dict.fromkeys((torch.floor_divide, Tensor.__floordiv__), operator.floordiv),
    **dict.fromkeys((torch.neg, Tensor.neg, Tensor.__neg__), operator.neg),
    Tensor.__rsub__: _flipped(operator.sub),
}
_DIVISIONS = (torch.div, Tensor.div)
_CONVERSIONS = (Tensor.long, Tensor.int, Tensor.clone, Tensor.detach)


class SizeTensors(TorchFunctionMode):
    """While active, records the value of one-element integer tensors made from sizes."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            raise CaptureError(
                f"{getattr(func, '__name__', func)} draws from a torch.Generator of its own, which "
                "no program can hold: draw from PyTorch's default one, which torch.manual_seed "
                "sets, or pass what was drawn as an argument"
            )
        result = func(*args, **kwargs)
        if isinstance(result, FakeTensor) and not result.shape and _is_integer(result):
            value = _find(func, args, kwargs)
            if value is not None:
                result.item_memo = value
        return result


def _is_integer(tensor: torch.Tensor) -> bool:
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex) and (
        tensor.dtype is not torch.bool
    )


def _find(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the size that a call's result holds; None for a plain number or an unknown value."""
    if func in _MAKERS:
        return args[0] if args and isinstance(args[0], torch.SymInt) else None
    values: list[Any] = [_size_in(a) for a in args]
    if any(v is None for v in values) or not any(isinstance(v, torch.SymInt) for v in values):
        return None
    if func in _CONVERSIONS:
        return values[0] if len(values) == 1 and not kwargs else None
    if func in _ARITHMETIC and not kwargs:
        return _ARITHMETIC[func](*values)
    if func in _DIVISIONS and len(values) == 2 and isinstance(values[1], int) and values[1] > 0:
        # A size is not negative, so rounding down and toward zero are the same.
        floors = {"floor", "trunc"} if isinstance(args[0], torch.SymInt) else {"floor"}
        if kwargs.get("rounding_mode") in floors:
            return values[0] // values[1]
    return None


def _size_in(value: Any) -> int | torch.SymInt | None:
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value
    found = value.item_memo if isinstance(value, FakeTensor) and not value.shape else None
    return found if isinstance(found, torch.SymInt) else None
