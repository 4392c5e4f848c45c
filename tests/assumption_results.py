"""Comparison of a model's results: the first difference, and whether it is one of rounding.

In: eager's result and another one; for what was bfloat16 also the module and its arguments. Out:
what differs, or None; True where the other is not much farther from float64's than eager's may be::

    difference(right, came, 0.08)                    ->  ("values", "output 0 is off by ...")
    is_rounding(model, (x,), {}, model(x), fast(x))  ->  True
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

EPS = torch.finfo(torch.bfloat16).eps


def difference(right: Any, came: Any, tolerance: float) -> tuple[str, str] | None:
    """Return (kind, details) of the first difference between two results, or None."""
    (a, left), (b, other) = pytree.tree_flatten(right), pytree.tree_flatten(came)
    if left != other:
        return "structure", f"{other}, eager {left}"
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
            if type(x) is not type(y) or x != y:
                return "values", f"output {i} is {y!r:.80}, eager's {x!r:.80}"
            continue
        for kind in ("shape", "dtype"):
            if getattr(x, kind) != getattr(y, kind):
                return kind, f"output {i} is {getattr(y, kind)}, eager's {getattr(x, kind)}"
        seen = [d for d in range(x.dim()) if x.shape[d] > 1]
        if x.numel() and [x.stride(d) for d in seen] != [y.stride(d) for d in seen]:
            return "strides", f"output {i} of {x.shape}: {y.stride()}, eager {x.stride()}"
        limit = {torch.float64: 1e-6, torch.float32: 2e-4, torch.bfloat16: 0.08}.get(x.dtype, 0.0)
        limit, wide, also = max(limit, tolerance), x.detach().double(), y.detach().double()
        scale = wide.nan_to_num(0, 0, 0).abs().max().clamp(min=1).item() if x.numel() else 1
        if not torch.allclose(also, wide, rtol=limit, atol=limit * scale, equal_nan=True):
            worst = (also - wide).abs().nan_to_num(float("inf")).max().item()
            return "values", f"output {i} of {x.shape} is off by {worst:.3g}"
    return None


def is_rounding(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], right: Any, came: Any
) -> bool:
    """Return whether `came` is at most 4 times as far from float64's result as `right` is, which
    may be 32 ulp of bfloat16: a model that takes another branch in float64 is no judge. Where
    `right` is close to float64's by luck, as behind a tanh of large values, what counts is how far
    it is where each of its operators rounds otherwise."""
    try:
        judge = _run_widened(model, args, kwargs)
        noisy = [_run_noisily(model, args, kwargs) for _ in range(8)]
    except Exception:
        return False
    leaves = [pytree.tree_leaves(tree) for tree in (right, came, judge, *noisy)]
    if len({len(values) for values in leaves}) > 1:
        return False
    for x, y, w, *others in zip(*leaves, strict=True):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            if difference(x, y, 0.0) is not None:
                return False
            continue
        if x.shape != w.shape or not all(t.isfinite().all() for t in (x, y, w)):
            return False
        scale = w.abs().max().clamp(min=1).item() if w.numel() else 1
        own, other, *spread = (
            (t.double() - w).abs().max().item() if w.numel() else 0 for t in (x, y, *others)
        )
        if own > 32 * EPS * scale or other > 4 * max(own, *spread) + 16 * EPS * scale:
            return False
    return True


def _run_widened(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    wide_args, wide_kwargs = pytree.tree_map(_widen, (tuple(args), dict(kwargs)))
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        return copy.deepcopy(model).double()(*wide_args, **wide_kwargs)


def _run_noisily(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    with torch.no_grad(), _Noise():
        return copy.deepcopy(model)(*args, **kwargs)


class _Noise(TorchDispatchMode):
    """Changes each new result of bfloat16 by at most one rounding to that dtype."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if func.is_view or func._schema.is_mutable:
            return made
        return pytree.tree_map(_noised, made)


def _noised(x: Any) -> Any:
    if not isinstance(x, torch.Tensor) or x.dtype is not torch.bfloat16:
        return x
    return (x * (1 + EPS * (2 * torch.rand_like(x, dtype=torch.float32) - 1))).to(x.dtype)


def _widen(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
