"""Tensor indices: turns indexing by a one-element tensor into a gather that does not read its
value.

In: calls such as x[:, i] and x.select(1, i) whose i is a 0-d tensor. Out: the same elements by an
op that reads i when the program runs; PyTorch would read the number while tracing::

    x[:, i]  ->  x.index_select(1, i.reshape(1))[:, 0]
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

Tensor: Any = torch.Tensor


class TensorIndices(TorchFunctionMode):
    """While active, around the model only, turns such calls into gathers."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = _take_at_tensors(func, args, kwargs)
        return func(*args, **kwargs) if found is NotImplemented else found


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
