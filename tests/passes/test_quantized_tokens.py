"""Quantised products over tokens: what becomes of them, what the checker rejects, spare rows.

In: a small attention module, its products quantised, over (batch, seq) with a mask. Out: the same
over tokens, where every row keeps the scale that it was quantised by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.passes.test_pack import IDS, MASK, Model, attend, keys_of, targets
from turbotx.capture.capture_sizes import capture_sizes
from turbotx.capture.tracing import tracing
from turbotx.engine.pipeline import rewrite
from turbotx.errors import PackError, VerifyError
from turbotx.ir.quantized_ops import (
    Scheme,
    quantize_rows,
    quantized_linear,
    row_scale,
    weight_only_linear,
)
from turbotx.kernels.fusion.quantized_rows import quantize_all_rows
from turbotx.passes.pack import TOKENS, PackedCapture, pack
from turbotx.passes.pack_check import check_packed
from turbotx.passes.quantize import Quantization
from turbotx.passes.quantize_check import check_quantized
from turbotx.passes.spare_rows import find_spare


def layer(m: Model, x: torch.Tensor, mask: torch.Tensor) -> Any:
    x = attend(m, m.norm(x), keys_of(mask)) + x
    return x, torch.tanh(m.inner(x[:, 0])).exp()


def packed(function: Callable[..., Any] = layer, float_rows: bool = False) -> PackedCapture:
    model = Model(function).eval()
    captured = capture_sizes(model, (), {"input_ids": IDS, "attention_mask": MASK})
    with tracing():
        paths = captured.graph_module.meta["paths"]
        rewrite(captured.graph, quantization=Quantization(paths, (), Scheme(float_rows=float_rows)))
        found = pack(captured)
        check_packed(found.graph, TOKENS)
        check_quantized(found.graph)
    return found


def test_rows_keep_their_scales() -> None:
    found = packed()
    first, pooled = found.graph.find_nodes(op="call_function", target=quantized_linear)
    rows, scale = first.args[0], first.args[4]
    assert rows.target is quantize_rows and rows.args[1] is scale
    assert scale.target is row_scale and scale.args[0] is rows.args[0]
    assert pooled.args[4] is None, "a first token's row is no kernel's"
    assert "sequence_token" in targets(found)


def test_rows_of_floats_stay() -> None:
    products = packed(float_rows=True).graph.find_nodes(
        op="call_function", target=weight_only_linear
    )
    assert len(products) == 2 and all(p.args[0].target is not quantize_rows for p in products)


def test_rows_of_tokens_are_refused() -> None:
    def across(m: Model, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = attend(m, x, keys_of(mask))
        return row_scale(x.mT) * mask[:, None]  # type: ignore[no-any-return]

    with pytest.raises(PackError, match="so that they meet"):
        packed(across)


def test_rows_that_are_added_change_no_other() -> None:
    found = packed()
    batch, seq = found.packing.batch, found.packing.seq
    assert find_spare(found.graph, batch, seq) == (batch, seq)
    quantize_all_rows(found.graph)
    assert find_spare(found.graph, batch, seq) == (batch, seq), "the pooled rows, too"


def scaled_by_others(found: PackedCapture) -> None:
    """Let each row have the scale of the token on the other end."""
    product = next(n for n in found.graph.nodes if n.target is quantized_linear and n.args[4])
    with found.graph.inserting_before(product):
        made = found.graph.call_function(torch.ops.aten.flip.default, (product.args[4], [1]))
    made.meta = dict(product.args[4].meta)
    product.args = (*product.args[:4], made, product.args[5])


def multiplied_by_tokens(found: PackedCapture) -> None:
    product = next(n for n in found.graph.nodes if n.target is quantized_linear and n.args[4])
    product.args = (product.args[0], product.args[0], *product.args[2:])


@pytest.mark.parametrize("spoil", [scaled_by_others, multiplied_by_tokens])
def test_the_checker_rejects(spoil: Callable[[PackedCapture], None]) -> None:
    found = packed()
    spoil(found)
    with tracing(), pytest.raises(VerifyError):
        check_packed(found.graph, TOKENS)
