"""Experts: the ops that `passes.experts` writes into the graph, and their meaning.

In: the expert that each row was given to, rows in the order of their experts, one weight an expert.
Out: where every row goes, and each row times its expert's weight; one launch each::

    order, place, ends = route(chosen, experts=8)    # ends: behind each expert's last row
    grouped_linear(x[order // 2], weight, ends)      # weight (experts, n, k)
"""

from __future__ import annotations

import itertools

import torch
from torch._subclasses.fake_tensor import FakeTensor

_library = torch.library.Library("turbotx", "FRAGMENT")
_library.define("grouped_mm(Tensor x, Tensor weight, Tensor ends) -> Tensor")


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return (rows, n) of x (rows, k) and weight (experts, n, k), by PyTorch's own ops.

    ends: int32 (experts,), not falling, at most `rows`. Rows ends[e - 1] to ends[e] are multiplied
    by the transposed weight[e]; those behind the last end are zero.
    """
    out = x.new_zeros(x.shape[0], weight.shape[1])
    if not isinstance(ends, FakeTensor):  # while tracing nobody knows them
        for matrix, (begin, end) in zip(
            weight, itertools.pairwise([0, *ends.tolist()]), strict=True
        ):
            torch.mm(x[begin:end], matrix.t(), out=out[begin:end])
    return out


def route(chosen: torch.Tensor, *, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return how rows are ordered by their experts, by PyTorch's own ops.

    chosen: int64 (rows,), each of 0 .. experts - 1. Out: order, int64 (rows,), the row that stands
    at each place, rows of one expert in their own order; place, its inverse; and ends, int32
    (experts,), the place behind each expert's last row.
    """
    order = torch.sort(chosen, stable=True)[1]
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device)
    each = torch.arange(experts, device=chosen.device)[:, None]
    return order, place, (chosen <= each).sum(1, dtype=torch.int32)


def _grouped_mm(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.grouped_mm`, with fake tensors of any dtype: weight (experts, k, n)."""
    return grouped_linear(x, weight.transpose(1, 2), ends)


_library.impl("grouped_mm", _grouped_mm, "CompositeExplicitAutograd")
torch.library.register_fake("turbotx::grouped_mm", _grouped_mm, lib=_library)
