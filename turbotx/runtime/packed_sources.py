"""Packed sources: which packed weights hold whole parameters, and where.

In: a program's packings, the packed weights, the parameters. Out: for each parameter that is
contained in a packed weight, its first row there; and the reverse::

    find_sources(packings, packed, tensors)  ->  {"q_weight": (packed, 0, False), "k_weight": ...}
    packed_before(packing, tensors)          ->  that packed weight, for parameters released to it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch

from turbotx.program.executable import Packing, WeightWindow
from turbotx.runtime.packed_parameter import PackedParameter
from turbotx.runtime.packed_weight import PackedExperts, PackedWeight


def find_sources(
    packings: Sequence[Packing], packed: Mapping[int, PackedWeight | PackedExperts],
    tensors: Mapping[str, torch.Tensor],
) -> dict[str, tuple[PackedWeight, int, bool]]:  # fmt: skip
    """Return, by name of a parameter contained in a packed weight, that weight, the first row
    there, and whether the rows are the parameter's columns."""
    found = {}
    for packing in packings:
        weight = packed[packing.slot]
        if not isinstance(weight, PackedWeight):
            continue  # experts keep their parameter
        parts = parameters_of(packing)
        for first, part in zip(_firsts(parts), parts, strict=True):
            transposed = turning(part, tensors[part.tensor])
            if transposed is not None:
                found[part.tensor] = (weight, first, transposed)
    return found


def parameters_of(packing: Packing) -> Sequence[WeightWindow]:
    """Return the parts of a packed weight; for int8, the parts that were quantised."""
    return packing.sources or packing.parts


def packed_before(packing: Packing, tensors: Mapping[str, torch.Tensor]) -> PackedWeight | None:
    """Return the packed weight to which all parts of a packing were released, in its order; None if
    there is none."""
    weights, parts = [], parameters_of(packing)
    for first, part in zip(_firsts(parts), parts, strict=True):
        own = tensors[part.tensor]
        if not isinstance(own, PackedParameter) or own.weight.gated != packing.gated:
            return None
        if own.first != first or own.transposed != turning(part, own):
            return None
        if (own.weight.scale is not None) != bool(packing.sources):
            return None
        if own.weight.group != packing.group:
            return None
        weights.append(own.weight)
    rows = sum(part.shape[0] for part in parts)
    one = weights[0]
    return one if all(w is one for w in weights) and one.count == rows else None


def _firsts(parts: Sequence[WeightWindow]) -> list[int]:
    return [0, *accumulate(part.shape[0] for part in parts)][:-1]


def turning(part: WeightWindow, whole: torch.Tensor) -> bool | None:
    """Return whether a window is the transpose of a whole matrix (True) or the matrix (False); None
    if it is only a part of it."""
    if whole.dim() != 2 or part.offset != 0:
        return None
    for transposed, strides in ((False, part.strides), (True, part.strides[::-1])):
        shape = part.shape[::-1] if transposed else part.shape
        pairs = zip(whole.shape, strides, whole.stride(), strict=True)
        if shape == tuple(whole.shape) and all(n == 1 or s == t for n, s, t in pairs):
            return transposed
    return None
