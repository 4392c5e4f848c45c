"""Widen: enlarges example inputs with sizes of 1, since export would specialize them.

In: a call's tensors. Out: similar tensors whose sizes of 1 tracing cannot specialize, and the dims
that vary, for example::

    widen([ids of (1, 7), mask of (1, 7)], 2, (), "left")  ->  [(2, 7), (2, 7)], [[0, 1], [0, 1]]
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeAlias

import torch

Places: TypeAlias = Collection[tuple[int, int]]
"""Dims of a call's tensors: (tensor index, dim)."""


def widen(
    tensors: Sequence[torch.Tensor], least: int, fixed: Places, sides: str
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Repeat size-1 dims so that tracing cannot specialize on them; also return the dims that vary.

    sides: where a larger size of another input keeps a size of 1 fixed: at the same position
    counted from the "left" or from "both" sides, as a (1, seq) mask beside (batch, seq) ids is
    broadcast; with "none" every size of 1 is fixed. Sizes of 0 and dims in `fixed` are always
    fixed. A tensor that is passed twice is cloned: tracing would treat it as one argument.
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
