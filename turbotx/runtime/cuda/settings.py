"""Settings: what the user has told PyTorch about the arithmetic of matrix products.

In: `torch.backends.cuda.matmul`. Out: what a program's kernels and graphs depend on of it; while
kernels are made for later, the settings of that later call::

    with assume_tf32(True): family.pick(sizes)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_assumed: ContextVar[bool | None] = ContextVar("tf32", default=None)


def uses_tf32() -> bool:
    """Tell whether the user lets float32 products round their factors to TF32."""
    assumed = _assumed.get()
    return torch.backends.cuda.matmul.fp32_precision == "tf32" if assumed is None else assumed


@contextmanager
def assume_tf32(value: bool) -> Iterator[None]:
    """Make `uses_tf32` return this value in this thread, inside the context."""
    token = _assumed.set(value)
    try:
        yield
    finally:
        _assumed.reset(token)


def math_settings() -> tuple[object, ...]:
    """Return the user's settings that decide what cuBLAS computes; a graph holds them as they
    were."""
    matmul = torch.backends.cuda.matmul
    return (
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
    )
