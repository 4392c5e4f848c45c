"""Int4 ops: weights as numbers of four bits with a scale a group of inputs, two to a byte.

In: rows of floats, (n, k). Out: bytes, (n, groups * group / 2), and float32 scales, (n, groups), or
with offsets (n, groups, 2); w ~ q * scale + offset, q from -8 to 7. k is filled up by zeros::

    scale = group_scale(w, 32, False)             # what has the largest magnitude becomes -8
    numbers = quantize_groups(w, scale, 32)       # uint8
    weight_only_linear(x, numbers, bias, scale)   # of ir.quantized_ops

Scales and offsets are numbers of bfloat16, so that kernels read two bytes each. A group that holds
NaN or an infinity has the scale NaN. One whose magnitudes are all below 2^-100 is quantised as if
its largest were that.
"""

from __future__ import annotations

from typing import Any

import torch

SMALLEST = 2.0**-100
GROUP = 32
"""How many inputs share a scale where turbotx quantises."""
OCTET = 8
"""Numbers that lie in four bytes: those of even places in the first two, the others behind them."""

_library = torch.library.Library("turbotx", "FRAGMENT")
_library.define("group_scale(Tensor x, int group, bool shifted) -> Tensor")
_library.define("quantize_groups(Tensor x, Tensor scale, int group) -> Tensor")


def pack_int4(numbers: torch.Tensor) -> torch.Tensor:
    """Return numbers from -8 to 7, (n, k) with k a multiple of 8, two to a byte: uint8 (n, k/2)."""
    octets = numbers.to(torch.uint8).bitwise_and(15).unflatten(-1, (-1, OCTET // 2, 2))
    pairs = octets.transpose(-1, -2).flatten(-2).unflatten(-1, (-1, 2))
    return (pairs[..., 0] | pairs[..., 1] << 4).flatten(-2)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Return the numbers of bytes as `pack_int4` makes them, int8."""
    pairs = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    octets = pairs.unflatten(-1, (-1, 2, OCTET // 2)).transpose(-1, -2).flatten(-3)
    return octets.to(torch.int8) - 16 * (octets > 7)


def dequantize_groups(packed: torch.Tensor, scale: torch.Tensor, depth: int) -> torch.Tensor:
    """Return what the first `depth` numbers of each row stand for, in the scale's dtype."""
    numbers = unpack_int4(packed).to(scale.dtype).unflatten(-1, (scale.shape[1], -1))
    if scale.dim() == 3:
        made = numbers * scale[..., :1] + scale[..., 1:]
    else:
        made = numbers * scale.unsqueeze(-1)
    return made.flatten(-2)[:, :depth]


def _groups(x: torch.Tensor, group: int) -> torch.Tensor:
    return torch.constant_pad_nd(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))


def divide(x: torch.Tensor, number: float) -> torch.Tensor:
    """Return x / number, correctly rounded: by a Python number, PyTorch multiplies by its
    reciprocal on a GPU, which moves ties of what is rounded next."""
    return x / torch.full_like(x, number)


def _short(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).float()


def _group_scale(x: torch.Tensor, group: int, shifted: bool) -> torch.Tensor:
    """Return (n, groups): the number of largest magnitude over -8, which has a number of its own;
    or if shifted (n, groups, 2): the range over 15, and what zero stands for."""
    parts = _groups(x.float(), group)
    low, high = parts.amin(-1), parts.amax(-1)
    if shifted:
        scale = _short(divide(high - low, 15.0).clamp_min(SMALLEST))
        made = torch.stack([scale, _short(low + 8 * scale)], -1)
        return torch.where((high - low < torch.inf).unsqueeze(-1), made, torch.nan)
    largest = torch.where(high > -low, high, low)
    tiny = largest.abs() < SMALLEST
    scale = _short(torch.where(tiny, SMALLEST, largest) / -8)
    return torch.where(largest.abs() < torch.inf, scale, torch.nan)


def _quantize_groups(x: torch.Tensor, scale: torch.Tensor, group: int) -> torch.Tensor:
    """Return round((x - offset) / scale) from -8 to 7, two to a byte, 0 in groups without a
    scale."""
    parts = _groups(x.float(), group)
    if scale.dim() == 3:
        numbers = (parts - scale[..., 1:]) * (1 / scale[..., :1])
    else:
        numbers = parts * (1 / scale.unsqueeze(-1))
    return pack_int4(numbers.nan_to_num(0.0).round().clamp(-8, 7).to(torch.int8).flatten(-2))


def _fake_group_scale(x: torch.Tensor, group: int, shifted: bool) -> torch.Tensor:
    groups = -(-x.shape[1] // group)
    sizes = (x.shape[0], groups, 2) if shifted else (x.shape[0], groups)
    return x.new_empty(sizes, dtype=torch.float32)


def _fake_quantize_groups(x: torch.Tensor, scale: torch.Tensor, group: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], scale.shape[1] * (group // 2), dtype=torch.uint8)


for _name, _meaning, _fake in (
    ("group_scale", _group_scale, _fake_group_scale),
    ("quantize_groups", _quantize_groups, _fake_quantize_groups),
):
    _library.impl(_name, _meaning, "CompositeExplicitAutograd")
    torch.library.register_fake(f"turbotx::{_name}", _fake, lib=_library)

group_scale: Any = torch.ops.turbotx.group_scale.default
quantize_groups: Any = torch.ops.turbotx.quantize_groups.default
