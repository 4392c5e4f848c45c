"""Settings: PyTorch's settings for the arithmetic of matrix products.

In: `torch.backends.cuda.matmul`. Out: what a program's kernels and graphs depend on of it; while
kernels are made for later, the settings of that later call::

    with assume_tf32(True): family.pick(sizes)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch

_assumed: ContextVar[bool | None] = ContextVar("tf32", default=None)


def uses_tf32() -> bool:
    """Return whether the user lets float32 products round their factors to TF32."""
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
    return tuple(get() for get in _getters())


@functools.cache
def _getters() -> tuple[Callable[[], object], ...]:
    """Return what reads the settings: PyTorch's own getters, where it has them by these names, at a
    fifth of the time that its attributes take."""
    matmul = torch.backends.cuda.matmul
    fp32 = getattr(torch._C, "_get_fp32_precision_getter", None)
    half = getattr(torch._C, "_get_cublas_allow_fp16_reduced_precision_reduction", None)
    bfloat = getattr(torch._C, "_get_cublas_allow_bf16_reduced_precision_reduction", None)
    return (
        partial(fp32, "cuda", "matmul") if fp32 else lambda: matmul.fp32_precision,
        half or (lambda: matmul.allow_fp16_reduced_precision_reduction),
        bfloat or (lambda: matmul.allow_bf16_reduced_precision_reduction),
    )
