"""Int4 ops: two numbers to a byte and back, scales of groups, and what quantising leaves."""

from __future__ import annotations

import math

import pytest
import torch

from turbotx.ir.int4_ops import (
    dequantize_groups,
    group_scale,
    pack_int4,
    quantize_groups,
    unpack_int4,
)
from turbotx.ir.quantized_ops import weight_only_linear


def test_bytes_hold_what_they_are_made_of() -> None:
    numbers = torch.randint(-8, 8, (5, 48), dtype=torch.int8)
    packed = pack_int4(numbers)
    assert packed.dtype is torch.uint8 and packed.shape == (5, 24)
    assert torch.equal(unpack_int4(packed), numbers)
    octet = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]])
    assert pack_int4(octet).tolist() == [[0x20, 0x64, 0x31, 0x75]], "even places first"


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("depth", [1, 32, 70])
def test_a_number_is_at_most_half_a_step_off(shifted: bool, depth: int) -> None:
    w = torch.randn(6, depth) + (3 if shifted else 0)
    scale = group_scale(w, 32, shifted)
    packed = quantize_groups(w, scale, 32)
    groups = -(-depth // 32)
    assert packed.shape == (6, 16 * groups)
    assert scale.shape == ((6, groups, 2) if shifted else (6, groups))
    step = (scale[..., 0] if shifted else scale).abs().repeat_interleave(32, 1)[:, :depth]
    error = (dequantize_groups(packed, scale, depth) - w).abs()
    # Half a step, or a whole one beside the number that is -8 steps, as there is no 8.
    assert (error <= step * 1.01 + 1e-2 * w.abs().max()).all()
    assert (error <= step * 0.51 + 1e-2 * w.abs().max()).float().mean() > 0.9
    assert torch.equal(scale, scale.bfloat16().float()), "kernels read two bytes"


def test_the_same_integers_come_again() -> None:
    """Weights whose floats were given up are quantised anew where they are arranged otherwise."""
    w = torch.randn(300, 64)
    w[0, :2] = torch.tensor([9.0, -9.0])
    scale = group_scale(w, 32, False)
    packed = quantize_groups(w, scale, 32)
    again = dequantize_groups(packed, scale, 64)
    assert torch.equal(group_scale(again, 32, False), scale)
    assert torch.equal(quantize_groups(again, scale, 32), packed)


def test_groups_of_zeros_denormals_infinities_and_nan() -> None:
    w = torch.randn(5, 32)
    w[0], w[1], w[2, 3], w[3, 4] = 0, 1e-42, math.inf, math.nan
    for shifted in (False, True):
        scale = group_scale(w, 32, shifted)
        made = dequantize_groups(quantize_groups(w, scale, 32), scale, 32)
        assert made[:2].abs().max() < 1e-20
        assert made.isnan().all(-1).tolist() == [False, False, True, True, False]


def test_a_product_has_the_sums_of_what_the_numbers_stand_for() -> None:
    w, x = torch.randn(7, 70), torch.randn(2, 3, 70)
    for shifted in (False, True):
        scale = group_scale(w, 32, shifted)
        packed = quantize_groups(w, scale, 32)
        ours = weight_only_linear(x.double(), packed, torch.ones(7), scale)
        floats = dequantize_groups(packed, scale.double(), 70)
        torch.testing.assert_close(ours, x.double() @ floats.t() + 1)
