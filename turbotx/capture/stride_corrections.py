"""Stride corrections: gives traced results eager's strides where PyTorch's tracer has other ones.

In: a model's calls under a trace. Out: the same results with eager's strides: where an op on fake
tensors gives wrong ones, the result is made dense in the right order of dims, at no cost to the
program::

    bn(x.transpose(1, 2))  ->  batch_norm(...).clone()       # eager's result is contiguous
    x.t() // 2             ->  floor_divide(...).t().clone().t()

The rules come from comparing both for every operator that PyTorch has samples of, also transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import _meta_registrations as metas
from torch import _prims_common as prims
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode

Tensor: Any = torch.Tensor
Order = Sequence[int]
"""Dims from slowest to fastest in memory."""
Rule = Callable[[Sequence[torch.Tensor], torch.Tensor], Order | None]
"""Returns the order of a result's dims, given the tensors among the arguments and the result as the
tracer has it; None if that is right."""


@contextmanager
def corrected_strides() -> Iterator[None]:
    """Context manager: give the results of calls traced by this thread the strides of eager
    mode."""
    index = metas.meta_index_Tensor  # called by fake tensors, the same from 2.11 to 2.14
    with StrideCorrections(), mock.patch.object(metas, "meta_index_Tensor", _by_indices(index)):
        yield


class StrideCorrections(TorchFunctionMode):
    """While active, gives results of the functions in `_RULES` eager's strides."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        rule = _RULES.get(func)
        if rule is None or not isinstance(result, FakeTensor) or result.dim() < 2:
            return result
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, FakeTensor)]
        with disable_proxy_modes_tracing():
            order = rule(given, result)
            if order is None or prims.is_contiguous_or_false(result.permute(*order)):
                return result
        back = sorted(range(len(order)), key=order.__getitem__)
        dense = result.permute(*order).clone(memory_format=torch.contiguous_format)
        return dense.permute(*back)


def _elementwise(given: Sequence[torch.Tensor], result: torch.Tensor) -> Order | None:
    """Return the order of one loop over all arguments; the tracer computes some ops in several
    steps."""
    expanded = [t.expand(result.shape) for t in given if t.dim()]
    return prims.compute_elementwise_output_logical_to_physical_perm(*expanded)[0] or None


def _suggested(given: Sequence[torch.Tensor], result: torch.Tensor) -> Order | None:
    """Dense, or channels last if the first argument is."""
    order = list(range(result.dim()))
    if prims.suggest_memory_format(given[0]) is not torch.contiguous_format:
        order.append(order.pop(1))
    return order


def _dense_if(holds: Callable[[Sequence[torch.Tensor], torch.Tensor], bool]) -> Rule:
    """Return the rule of a result that is dense under a condition, and as the tracer has it
    otherwise."""
    return lambda given, result: list(range(result.dim())) if holds(given, result) else None


_ELEMENTWISE = (
    torch.copysign, Tensor.copysign, torch.floor_divide, Tensor.floor_divide, Tensor.__floordiv__,
    Tensor.__rfloordiv__, torch.div, Tensor.div, torch.divide, Tensor.divide, torch.logaddexp,
    Tensor.logaddexp, torch.logical_and, Tensor.logical_and, torch.logical_or, Tensor.logical_or,
    torch.logical_xor, Tensor.logical_xor, torch.heaviside, Tensor.heaviside,
    torch.ldexp, Tensor.ldexp,
)  # fmt: skip
_RULES: dict[Any, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    Tensor.__rpow__: _dense_if(lambda given, result: len(given) == 1),  # with a scalar
    **dict.fromkeys((torch.angle, Tensor.angle), _dense_if(lambda x, _: x[0].is_complex())),
    **dict.fromkeys((torch.batch_norm, F.batch_norm), _suggested),
    **dict.fromkeys(
        (torch.max_pool1d, F.max_pool1d),
        _dense_if(lambda given, result: result.device.type == "cpu"),
    ),
}


def _by_indices(index: Any) -> Any:
    """Return a replacement for `index`, the fake kernel of `aten.index`, that also takes the order
    of the indices into account; the original considers only the tensor's."""

    def meta(tensor: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> torch.Tensor:
        made: torch.Tensor = index(tensor, indices)
        places = [d for d, i in enumerate(indices) if i is not None]
        found = [i for i in indices if i is not None]
        masks = any(i.dtype not in (torch.int64, torch.int32) for i in found)
        if masks or all(i.dim() < 2 or prims.is_contiguous_or_false(i) for i in found):
            return made
        rank = max(i.dim() for i in found)
        adjacent = places[-1] - places[0] + 1 == len(places)
        begin = places[0] if adjacent else 0
        end = begin + rank
        kept = [s for d, s in enumerate(tensor.stride()) if d not in places]
        strides = [[*kept[:begin], *[0] * rank, *kept[begin:]]]
        for i in found:
            own = i.expand(made.shape[begin:end]).stride()
            strides.append([*[0] * begin, *own, *[0] * (made.dim() - end)])
        looped = [made.new_empty_strided(made.shape, s) for s in strides]
        order = prims.compute_elementwise_output_logical_to_physical_perm(*looped)[0]
        dense = made.new_empty([made.shape[d] for d in order])
        return dense.permute(*sorted(range(len(order)), key=order.__getitem__))

    return meta
