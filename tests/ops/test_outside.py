"""Ops that ATen runs on purpose have a reason of their own, and no row."""

from __future__ import annotations

import torch

from turbotx.ops import OPS, why_outside
from turbotx.ops.outside import REASONS

aten = torch.ops.aten


def test_reasons() -> None:
    assert why_outside(aten.topk.default).startswith("aten.topk.default orders a row")
    assert why_outside(aten.convolution.default).endswith("the vendor's library does that")
    assert why_outside(aten.special_i0e.default) == (
        "aten.special_i0e.default has no row in the op table"
    )


def test_an_op_is_either_in_the_table_or_outside() -> None:
    computed = {target.overloadpacket.__name__ for target in OPS}
    assert not computed & set(REASONS)
    assert all(hasattr(aten, name) for name in REASONS)
