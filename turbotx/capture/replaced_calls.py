"""Replaced calls: calls of the model that PyTorch would not trace as they are, as ops that it does.

In: x[:, i] and x.select(1, i) whose i is a 0-d tensor; `grouped_mm` of any dtype and width that
eager mode accepts. Out: an op that reads i when the program runs, where PyTorch would read the
number while tracing; turbotx's op, since PyTorch's fake kernel accepts only bfloat16 with rows of
multiples of 16 bytes::

    x[:, i]                       ->  x.index_select(1, i.reshape(1))[:, 0]
    grouped_mm(x, w, offs=ends)   ->  torch.ops.turbotx.grouped_mm(x, w, ends)
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from turbotx.ir import expert_ops

assert expert_ops  # imported because it registers the op
Tensor: Any = torch.Tensor
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The public function, and the private op that it calls.
_GROUPED = ((torch, "_grouped_mm"), (torch.nn.functional, "grouped_mm"))


class ReplacedCalls(TorchFunctionMode):
    """While active, around the model only, replaces such calls."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not None and any(func is getattr(m, name, None) for m, name in _GROUPED):
            names = ("mat_a", "mat_b", "offs", "bias", "out_dtype")
            given = dict(zip(names, args, strict=False)) | kwargs
            if _is_plain(given):
                return torch.ops.turbotx.grouped_mm(given["mat_a"], given["mat_b"], given["offs"])
        found = _take_at_tensors(func, args, kwargs)
        return func(*args, **kwargs) if found is NotImplemented else found


def _is_plain(given: dict[str, Any]) -> bool:
    """Return whether a call multiplies rows by their experts' weights and does nothing else; calls
    that PyTorch refuses are left to it."""
    tensors: list[Any] = [given.get(name) for name in ("mat_a", "mat_b", "offs")]
    if not all(isinstance(t, torch.Tensor) for t in tensors):
        return False
    x, weight, ends = tensors
    if given.get("bias") is not None or given.get("out_dtype") not in (None, x.dtype):
        return False
    if (x.dim(), weight.dim(), ends.dim(), ends.dtype) != (2, 3, 1, torch.int32):
        return False
    fits = x.shape[1] == weight.shape[1] and ends.shape[0] == weight.shape[0]
    return bool(fits and x.dtype == weight.dtype and x.dtype in _DTYPES)


def _take_at_tensors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the result of a call, or NotImplemented if no tensor is used as a single index in
    it."""
    if func is Tensor.__getitem__:
        return _index(*args)
    if func in (Tensor.select, torch.select):
        given = dict(zip(("self", "dim", "index"), args, strict=False)) | kwargs
        given["self"] = given.pop("input", given.get("self"))
        if is_place(given.get("index")):
            return _take(given["self"], given["dim"], given["index"]).select(given["dim"], 0)
    return NotImplemented


def is_place(value: Any) -> bool:
    """Return whether a tensor holds one integer that is unknown while tracing."""
    return (
        isinstance(value, FakeTensor)
        and value.dim() == 0
        and value.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
        and value.item_memo is None
        and value.constant is None
    )


def _as_size(part: Any) -> Any:
    """Return the size that a tensor is known to hold: PyTorch 2.11 would read it again."""
    memo = part.item_memo if isinstance(part, FakeTensor) and not part.shape else None
    return memo if isinstance(memo, torch.SymInt) else part


def _index(tensor: Any, index: Any) -> Any:
    given = list(index) if isinstance(index, tuple) else [index]
    parts = list(map(_as_size, given))
    sized = any(p is not q for p, q in zip(parts, given, strict=True))
    if not (sized or any(map(is_place, parts))) or not isinstance(tensor, torch.Tensor):
        return NotImplemented
    taken = sum(_dims_of(p) for p in parts)
    d = 0
    for k, part in enumerate(parts):
        if part is Ellipsis:
            d += tensor.dim() - taken
        elif is_place(part):
            tensor, parts[k] = _take(tensor, d, part), 0
        d += _dims_of(part)
    return tensor[tuple(parts)]


def _dims_of(part: Any) -> int:
    """Return the number of the tensor's dims that a part of an index consumes."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    if isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8) and part.dim():
        return part.dim()
    return 1


def _take(tensor: Any, d: int, place: Any) -> Any:
    """Return a tensor with one element left along dim `d`; `place` may be negative."""
    place = torch.where(place < 0, place + tensor.shape[d], place)
    return tensor.index_select(d, place.reshape(1).to(torch.int64))
