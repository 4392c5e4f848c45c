"""Widen: example inputs whose sizes of 1 are replaced, since export would specialize them.

In: a call's tensors. Out: like ones whose sizes of 1 tracing cannot take for fixed, and the dims
that vary, for example::

    widen([ids of (1, 7), mask of (1, 7)], 2, (), "left")  ->  [(2, 7), (2, 7)], [[0, 1], [0, 1]]
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeAlias

import torch

Places: TypeAlias = Collection[tuple[int, int]]
"""Dims of a call's tensors: the tensor's number and the dim's."""


def widen(
    tensors: Sequence[torch.Tensor], least: int, fixed: Places, sides: str
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Repeat size-1 dims so that tracing cannot specialise on them; list the dims that vary.

    sides: where another input with a larger size keeps a size 1 fixed: at the same position from
    the "left" or from "both" sides, as a (1, seq) mask beside (batch, seq) ids is a broadcast; with
    "none" every size 1 is fixed. A size of 0 is always, and where `fixed` says so. Inputs that are
    one tensor become two: tracing would take them for one argument.
    """
    largest: dict[int, int] = {}
    for tensor in tensors:
        for d, size in enumerate(tensor.shape):
            for place in (d, d - tensor.dim()):
                largest[place] = max(largest.get(place, 0), size)
    widened: list[torch.Tensor] = []
    varying = []
    for i, tensor in enumerate(tensors):
        dims = []
        rank = tensor.dim()
        if any(tensor is other for other in widened):
            tensor = tensor.clone()
        for d, size in enumerate(tensor.shape):
            beside = largest[d] if sides == "left" else max(largest[d], largest[d - rank])
            spread = size == 1 and (beside > 1 or sides == "none")
            if spread or size == 0 or (i, d) in fixed:
                continue
            dims.append(d)
            if size <= 2 and size < least:
                places = torch.arange(least, device=tensor.device) % size
                tensor = tensor.index_select(d, places)
        widened.append(tensor)
        varying.append(dims)
    return widened, varying
