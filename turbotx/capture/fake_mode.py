"""Remembering fake mode: caches the results of ops on fake tensors for arguments of equal sizes.

In: the ops of a trace. Out: their fake results; those of a repeated call are rebuilt from sizes and
strides. Deriving them from symbolic sizes takes PyTorch a millisecond or more, and the equal layers
of a model repeat the same calls::

    with remembering_fakes():  torch.export.export(model, ...)   # 48 layers at the cost of one

With symbolic sizes, PyTorch's own cache of fake results costs as much as the op itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._export import non_strict_utils
from torch._higher_order_ops.utils import registered_hop_fake_fns
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)

from turbotx.capture.ambient import read_ambient
from turbotx.capture.recurrent_layers import describe_recurrent, is_recurrent
from turbotx.capture.tracing import replaced_in_thread
from turbotx.errors import CaptureError
from turbotx.ir.fake_results import UnknownError, describe, describe_arguments, is_sized_by
from turbotx.ir.memory_order import memory_of

Size = int | torch.SymInt
_RAW = frozenset((torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_copy.default))
"""Ops that ignore their argument's sizes and read the memory behind it."""


@dataclass(frozen=True)
class _Made:
    """A fake result and its layout, in memory of its own or in that of the argument number
    `shows`."""

    dtype: torch.dtype
    device: torch.device
    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    offset: Size
    shows: int | None


class RememberingFakeMode(FakeTensorMode):
    """A fake mode that caches the results of calls."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cache_enabled = False
        self._known: dict[Any, tuple[bool, tuple[_Made | int | None, ...]]] = {}

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        # The fake rule of an op that runs nested graphs is looked up by the mode's exact type
        # (cond, while_loop) or by the mode (flex_attention).
        if func not in registered_hop_fake_fns and isinstance(func, HigherOrderOperator):
            return func.python_key_table[FakeTensorMode](self, *args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _dispatch_impl(
        self, func: Any, types: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        # A private method of PyTorch, the same from 2.11 to 2.13: if it is renamed, nothing is
        # cached and every result is still right.
        with torch._C.DisableTorchFunction():
            key = self._key(func, args, kwargs)
            found = None if key is None else self._known.get(key)
            if found is not None:
                return self._make(found, args, kwargs)
        if is_recurrent(func):
            return describe_recurrent(func, args, kwargs)
        if func is torch.ops.aten.native_group_norm.default:
            _check_group_norm(*args, **kwargs)
        result = super()._dispatch_impl(func, types, args, kwargs)
        if key is not None:
            with torch._C.DisableTorchFunction():
                self._remember(key, result, args, kwargs)
        return result

    def _key(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return everything that a call's result depends on; None if it must not be cached."""
        if not isinstance(func, OpOverload) or func._schema.is_mutable or func in _RAW:
            return None
        try:
            return func, read_ambient(), describe_arguments(args, kwargs, self)
        except UnknownError:
            return None

    def _remember(
        self, key: Any, result: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        given = _tensors(args, kwargs)
        whole = isinstance(result, torch.Tensor)
        if not whole and not isinstance(result, (tuple, list)):
            return
        parts = [result] if whole else result
        if not all(x is None or type(x) is FakeTensor for x in parts):
            return
        try:
            made = tuple(self._note(x, given, key) for x in parts)
        except UnknownError:
            return
        own = [memory_of(x) for x, m in zip(parts, made, strict=True) if _owns(m)]
        if len(set(own)) == len(own):  # no two results in one new memory
            self._known[key] = (whole, made)

    def _note(self, value: Any, given: list[FakeTensor], key: Any) -> _Made | int | None:
        if value is None:
            return None
        for k, tensor in enumerate(given):
            if value is tensor:
                return k
        if value.requires_grad or not is_sized_by(describe(value, self), key):
            raise UnknownError
        memory = memory_of(value)
        shows = next((k for k, t in enumerate(given) if memory_of(t) == memory), None)
        if shows is None and value.storage_offset() != 0:
            raise UnknownError
        if shows is not None and given[shows].dtype != value.dtype:
            raise UnknownError  # a view by another dtype, as of a complex tensor's real part
        return _Made(
            value.dtype, value.device, tuple(value.shape), tuple(value.stride()),
            value.storage_offset(), shows,
        )  # fmt: skip

    def _make(
        self, found: tuple[bool, tuple[_Made | int | None, ...]], args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:  # fmt: skip
        whole, parts = found
        given = _tensors(args, kwargs)
        made = [self._make_one(part, given) for part in parts]
        return made[0] if whole else tuple(made)  # the dispatcher accepts a tuple for a list

    def _make_one(self, part: _Made | int | None, given: list[FakeTensor]) -> Any:
        if part is None or isinstance(part, int):
            return None if part is None else given[part]
        with in_kernel_invocation_manager(self):
            if part.shows is None:
                raw = torch.empty_strided(part.shape, part.strides, dtype=part.dtype, device="meta")
            else:
                raw = torch.as_strided(given[part.shows], part.shape, part.strides, part.offset)
        return FakeTensor(self, raw, part.device)


def _check_group_norm(
    input: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
    N: Size, C: Size, HxW: Size, group: int, eps: float,
) -> None:  # fmt: skip
    """Raise CaptureError if the numbers given to `native_group_norm` are not its tensors' sizes.

    PyTorch's rule for fake results compares only some of them. Eager mode refuses most of what is
    refused here, and otherwise normalises what the memory holds, whatever sizes the tensor has.
    """
    sizes = input.shape
    fits = len(sizes) >= 2 and sizes[0] == N and sizes[1] == C and input.numel() == N * C * HxW
    if not fits or any(p is not None and p.numel() != C for p in (weight, bias)):
        raise CaptureError(
            f"cannot capture native_group_norm with N={N}, C={C} and HxW={HxW} of a tensor of "
            "other sizes: view it as (N, C, ...), and give a weight and a bias of C numbers each"
        )


def _owns(made: _Made | int | None) -> bool:
    return isinstance(made, _Made) and made.shows is None


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[FakeTensor]:
    return [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)]


def remembering_fakes() -> AbstractContextManager[None]:
    """Context manager: use the caching fake mode for exports in this thread."""
    return replaced_in_thread(non_strict_utils, "FakeTensorMode", RememberingFakeMode)
