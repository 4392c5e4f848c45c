"""Grouped products: accepts PyTorch's `grouped_mm` in all dtypes of eager mode while tracing.

In: `grouped_mm(x, weight, offs=ends)` of any dtype and width that eager mode accepts. Out: the same
as an op of turbotx; PyTorch's fake kernel accepts only bfloat16 with rows of multiples of 16
bytes::

    grouped_mm(x, w, offs=ends)  ->  torch.ops.turbotx.grouped_mm(x, w, ends)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from turbotx.ir import expert_ops

assert expert_ops  # imported because it registers the op
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The public function, and the private op that it calls.
_NAMES = ((torch, "_grouped_mm"), (torch.nn.functional, "grouped_mm"))


class GroupedProducts(TorchFunctionMode):
    """While active, around the model only, replaces such calls by turbotx's op."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not None and any(func is getattr(m, name, None) for m, name in _NAMES):
            names = ("mat_a", "mat_b", "offs", "bias", "out_dtype")
            given = dict(zip(names, args, strict=False)) | kwargs
            if _is_plain(given):
                return torch.ops.turbotx.grouped_mm(given["mat_a"], given["mat_b"], given["offs"])
        return func(*args, **kwargs)


def _is_plain(given: dict[str, Any]) -> bool:
    """Return whether a call multiplies rows by their experts' weights and does nothing else; calls
    that PyTorch refuses are left to it."""
    tensors: list[Any] = [given.get(name) for name in ("mat_a", "mat_b", "offs")]
    if not all(isinstance(t, torch.Tensor) for t in tensors):
        return False
    x, weight, ends = tensors
    if given.get("bias") is not None or given.get("out_dtype") not in (None, x.dtype):
        return False
    if (x.dim(), weight.dim(), ends.dim(), ends.dtype) != (2, 3, 1, torch.int32):
        return False
    fits = x.shape[1] == weight.shape[1] and ends.shape[0] == weight.shape[0]
    return bool(fits and x.dtype == weight.dtype and x.dtype in _DTYPES)
