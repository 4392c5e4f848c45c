"""Packed weights: panels hold every element, in any layout, and give it back bit for bit."""

from __future__ import annotations

import pytest
import torch

from turbotx.runtime.cpu.launch_table import load_library
from turbotx.runtime.packed_weight import PackedWeight, PanelLayout, pack, unpack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_rows_come_back_bit_for_bit(dtype: torch.dtype, gated: bool) -> None:
    native, _ = load_library("products")
    parts = [torch.randn(37, 19), torch.randn(19, 35).t(), torch.randn(2, 19)]
    parts = [p.to(dtype) for p in parts]
    whole = torch.cat(parts)
    packed = PackedWeight.of(native, parts, gated)
    assert torch.equal(packed.rows(0, 74), whole)
    for first, count in ((0, 37), (37, 35), (72, 2), (30, 30), (36, 1)):
        assert torch.equal(packed.rows(first, count), whole[first : first + count])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_panels_are_those_of_the_runtime(dtype: torch.dtype, gated: bool) -> None:
    native, _ = load_library("products")
    weight = torch.randn(70, 33).to(dtype)
    panels = pack(weight, PanelLayout.of(native, dtype), gated)
    assert torch.equal(panels, PackedWeight.of(native, [weight], gated).panels)
    mapped = PackedWeight.over(native, panels, 70, 33, gated)
    assert mapped.panels.data_ptr() == panels.data_ptr()
    assert torch.equal(mapped.rows(0, 70), weight)


@pytest.mark.parametrize("layout", [PanelLayout(16, 1), PanelLayout(32, 1), PanelLayout(32, 2)])
@pytest.mark.parametrize("gated", [False, True])
def test_panels_of_other_processors(layout: PanelLayout, gated: bool) -> None:
    weight = torch.randn(38, 13)
    assert torch.equal(unpack(pack(weight, layout, gated), 38, 13, 0, 38), weight)
