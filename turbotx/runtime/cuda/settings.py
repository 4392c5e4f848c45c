"""Settings: PyTorch's settings for the arithmetic of matrix products.

In: `torch.backends.cuda.matmul`. Out: the settings that kernels and graphs depend on, which can be
overridden when kernels are built for another setting::

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
    """Return whether the user allows TF32 in float32 products."""
    assumed = _assumed.get()
    return torch.backends.cuda.matmul.fp32_precision == "tf32" if assumed is None else assumed


@contextmanager
def assume_tf32(value: bool) -> Iterator[None]:
    """Context in which `uses_tf32` returns `value`, in this thread."""
    token = _assumed.set(value)
    try:
        yield
    finally:
        _assumed.reset(token)


def math_settings() -> tuple[object, ...]:
    """Return the settings that affect cuBLAS; a captured graph keeps those of its capture."""
    return tuple(get() for get in _getters())


@functools.cache
def _getters() -> tuple[Callable[[], object], ...]:
    """Return functions that read the settings: PyTorch's C getters if it has them, five times
    faster than its attributes."""
    matmul = torch.backends.cuda.matmul
    fp32 = getattr(torch._C, "_get_fp32_precision_getter", None)
    half = getattr(torch._C, "_get_cublas_allow_fp16_reduced_precision_reduction", None)
    bfloat = getattr(torch._C, "_get_cublas_allow_bf16_reduced_precision_reduction", None)
    return (
        partial(fp32, "cuda", "matmul") if fp32 else lambda: matmul.fp32_precision,
        half or (lambda: matmul.allow_fp16_reduced_precision_reduction),
        bfloat or (lambda: matmul.allow_bf16_reduced_precision_reduction),
    )
