"""Folded weights: the constants of a GEMM that normalises its input or residual.

In: the parameters of a linear and of the norm before it. Out: what `GemmTemplate.norm` and
`.residual_norm` read, recomputed whenever a parameter changes::

    LN(x) W + bias = rstd * (x (gamma W) - mean * sums) + shift,    shift = beta W + bias

Each is a function of tensors, so that a program can compute it as a hoisted constant.
"""

from __future__ import annotations

import torch

Given = torch.Tensor | None


def fold_weight(weight: torch.Tensor, gamma: Given, scales: Given) -> torch.Tensor:
    """Return gamma W in W's dtype, each row divided by its scale. weight: (n, k), gamma: (k,)."""
    wide = _widen(weight) if gamma is None else _widen(weight) * _widen(gamma)
    return (wide if scales is None else wide / scales[:, None]).to(weight.dtype)


def fold_scales(weight: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Return powers of two, float32 (n,), close to the largest magnitude of each row of gamma W.

    Without them, gamma W of a small gamma loses bits below float16's normal range, and that of a
    large one may overflow.
    """
    largest = (weight.float() * gamma.float()).abs().amax(1)
    exponent = torch.frexp(largest).exponent
    usable = largest.isfinite() & (largest > 0)
    return torch.ldexp(torch.ones_like(largest), torch.where(usable, exponent, 0))


def fold_sums(folded: torch.Tensor, scales: Given) -> torch.Tensor:
    """Return the sums of gamma W over k, float32 (n,), computed from the rounded `folded`, as the
    product with x will contain them."""
    sums = folded.sum(1, dtype=torch.float64)
    return (sums if scales is None else sums * scales).float()


def fold_shift(weight: torch.Tensor, beta: Given, bias: Given) -> torch.Tensor:
    """Return beta W + bias, float32 (n,)."""
    shift = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    if beta is not None:
        shift += (_widen(weight) * _widen(beta)).sum(1, dtype=torch.float64)
    return (shift if bias is None else shift + bias.double()).float()


def join_affine(like: torch.Tensor, gamma: Given, beta: Given) -> torch.Tensor:
    """Return gamma and beta as float32 (2, n), ones and zeros by default.

    like: any tensor of n rows on the same device.
    """
    count, device = len(like), like.device
    one = torch.ones(count, device=device) if gamma is None else gamma.float()
    zero = torch.zeros(count, device=device) if beta is None else beta.float()
    return torch.stack((one, zero))


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in a dtype that holds products of two such values (nearly) exactly."""
    return tensor.double() if tensor.dtype is torch.float32 else tensor.float()
