"""Experts: the ops that `passes.experts` writes into the graph, defined by PyTorch's own ops.

In: the expert of each row, rows sorted by expert, one weight per expert. Out: the sorted order, and
each row times its expert's weight; one launch each::

    order, place, ends = route(chosen, experts=8)    # ends: after each expert's last row
    grouped_linear(x[order // 2], weight, ends)      # weight (experts, n, k)
"""

from __future__ import annotations

import itertools

import torch
from torch._subclasses.fake_tensor import FakeTensor

_library = torch.library.Library("turbotx", "FRAGMENT")
_library.define("grouped_mm(Tensor x, Tensor weight, Tensor ends) -> Tensor")


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return the (rows, n) product of x (rows, k) and weight (experts, n, k), by PyTorch's own ops.

    ends: int32 (experts,), nondecreasing, at most `rows`. Rows ends[e - 1] to ends[e] are
    multiplied by the transposed weight[e]; those after the last end are zero.
    """
    out = x.new_zeros(x.shape[0], weight.shape[1])
    if not isinstance(ends, FakeTensor):  # values are unknown while tracing
        for matrix, (begin, end) in zip(
            weight, itertools.pairwise([0, *ends.tolist()]), strict=True
        ):
            torch.mm(x[begin:end], matrix.t(), out=out[begin:end])
    return out


def route(chosen: torch.Tensor, *, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the order of rows sorted by expert, by PyTorch's own ops.

    chosen: int64 (rows,), each in [0, experts). Returns order, int64 (rows,), the row at each
    place, stable within an expert; place, its inverse; and ends, int32 (experts,), the place after
    each expert's last row.
    """
    order = torch.sort(chosen, stable=True)[1]
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device)
    each = torch.arange(experts, device=chosen.device)[:, None]
    return order, place, (chosen <= each).sum(1, dtype=torch.int32)


def _grouped_mm(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.grouped_mm` with fake tensors of any dtype: weight (experts, k, n)."""
    return grouped_linear(x, weight.transpose(1, 2), ends)


_library.impl("grouped_mm", _grouped_mm, "CompositeExplicitAutograd")
torch.library.register_fake("turbotx::grouped_mm", _grouped_mm, lib=_library)
