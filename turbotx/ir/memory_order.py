"""Memory order: the order in which a tensor's dims lie in memory, and permutation to it.

In: an input of a call. Out: its dims from the slowest-varying in memory to the fastest, if that is
not their own order. Captures depend on it, since the strides of eager's results do::

    memory_order(torch.empty(2, 3, 8).transpose(1, 2))  ->  (0, 2, 1)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def memory_order(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Return a tensor's dims from slowest to fastest-varying in memory; None if already in order.

    Dims of size 1 and of stride 0 keep their positions.
    """
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    moved = [d for d, (n, s) in enumerate(zip(tensor.shape, strides, strict=True)) if n > 1 and s]
    order = list(range(tensor.dim()))
    for place, d in zip(moved, sorted(moved, key=lambda d: -strides[d]), strict=True):
        order[place] = d
    return tuple(order) if order != list(range(tensor.dim())) else None


def expanded_dims(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the dims of several elements that are all the same one in memory."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(d for d, (n, stride) in enumerate(sizes) if n > 1 and not stride)


def has_dense_strides(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's strides are those of a dense one, also in dims of size 1, whose
    stride decides nothing."""
    step = 1
    for n, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != step:
            return False
        step *= max(n, 1)
    return True


def has_version(tensor: torch.Tensor) -> bool:
    """Return whether PyTorch counts writes to a tensor: not to one made under inference mode, even
    if its `data` was replaced since, so that it no longer says that it is one."""
    try:
        return tensor._version >= 0
    except RuntimeError:
        return False


def memory_of(tensor: torch.Tensor) -> int | None:
    """Return the identity of a tensor's storage; None for a tensor without one, as under vmap."""
    with torch._C.DisableTorchFunction(), suppress(NotImplementedError):
        return int(tensor.untyped_storage()._cdata)
    return None


def by_order(values: Sequence[T], order: Sequence[int] | None) -> tuple[T, ...]:
    """Return one value per dim, reordered by `order`."""
    return tuple(values) if order is None else tuple(values[d] for d in order)


def inverse(order: Sequence[int] | None) -> list[int] | None:
    """Return the inverse permutation."""
    return None if order is None else sorted(range(len(order)), key=order.__getitem__)


def in_memory(tensor: torch.Tensor, order: Sequence[int] | None) -> torch.Tensor:
    """Return a tensor with its dims in memory order, as programs take it."""
    return tensor if order is None else tensor.permute(*order)


def key_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return the part of an input's description that selects a capture, sizes excluded."""
    order = memory_order(tensor)
    kind = (tensor.dtype, tensor.device, tensor.dim())
    return kind if order is None else (*kind, order)


def make_dense(tensor: torch.Tensor, order: Sequence[int] | None) -> torch.Tensor:
    """Return a tensor in memory order, dense and at offset 0; the tensor itself if it already
    is."""
    if order is None and has_dense_strides(tensor) and tensor.storage_offset() == 0:
        return tensor
    return in_memory(tensor.detach(), order).clone(memory_format=torch.contiguous_format)


def moved_dims(dims: Sequence[int], order: Sequence[int] | None) -> list[int]:
    """Return the positions of some dims in memory order."""
    return list(dims) if order is None else sorted(order.index(d) for d in dims)
