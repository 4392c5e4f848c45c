"""What `nn.TransformerEncoder` gives where it is padded: zeros or the layers' values, as eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import turbotx

LAYER = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
ENDS = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
BEGINNING = torch.tensor([[1, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]).bool()


def compare(fast: Any, encoder: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    right = encoder(*args, **kwargs)
    torch.testing.assert_close(fast(*args, **kwargs), right, atol=1e-5, rtol=1e-5)
    return right


@pytest.mark.parametrize("norm", [None, nn.LayerNorm(8)], ids=["no norm", "norm"])
def test_padding_is_as_eager_leaves_it(norm: nn.Module | None) -> None:
    encoder = nn.TransformerEncoder(LAYER, 1, norm).eval()
    fast, x = turbotx.optimize(encoder, backend="aten"), torch.randn(3, 5, 8)
    empty = torch.zeros(8)  # what the norm makes of zeros
    with torch.no_grad():
        hidden = compare(fast, encoder, x, src_key_padding_mask=ENDS)[ENDS]
        assert torch.equal(hidden, empty.expand_as(hidden))
        compare(fast, encoder, x, src_key_padding_mask=BEGINNING)  # no nested tensors of that
        compare(fast, encoder, x[:, :2], src_key_padding_mask=ENDS[:, 3:])
    assert fast.stats()["captures"] == 1
    hidden = compare(fast, encoder, x, src_key_padding_mask=ENDS)[ENDS[:2].nonzero().unbind(1)]
    assert hidden.abs().max() > 0.1  # with gradients: what the layer computes
    assert fast.stats()["captures"] == 2


def test_a_switched_off_fast_path_is_another_capture() -> None:
    encoder = nn.TransformerEncoder(LAYER, 1).eval()
    fast, x = turbotx.optimize(encoder, backend="aten"), torch.randn(3, 5, 8)
    with torch.no_grad():
        zeros = compare(fast, encoder, x, src_key_padding_mask=ENDS)[0, 4]
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            values = compare(fast, encoder, x, src_key_padding_mask=ENDS)[0, 4]
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        compare(fast, encoder, x, src_key_padding_mask=ENDS)
    assert not zeros.any() and values.all()


def test_other_masks_are_as_in_eager() -> None:
    encoder = nn.TransformerEncoder(LAYER, 1).eval()
    fast, x = turbotx.optimize(encoder, backend="aten"), torch.randn(3, 5, 8)
    weak = torch.zeros(3, 5).masked_fill(ENDS, -1.0)  # of floats: what is no zero is left out
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    with torch.no_grad():
        assert not compare(fast, encoder, x, src_key_padding_mask=weak)[ENDS].any()
        # Two masks: the layers' values. PyTorch's own op makes a row hidden as a whole NaN.
        masks = {"mask": causal, "src_key_padding_mask": ENDS[:2]}
        assert compare(fast, encoder, x[:2], **masks)[0, 4].all()
    unchecked = nn.TransformerEncoder(LAYER, 1, mask_check=False).eval()
    fast = turbotx.optimize(unchecked, backend="aten")
    with torch.no_grad():
        compare(fast, unchecked, x, src_key_padding_mask=ENDS)
        compare(fast, unchecked, x, src_key_padding_mask=BEGINNING)


def test_a_decoder_sees_the_zeros_of_its_encoder() -> None:
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True).eval()
    fast = turbotx.optimize(model, backend="aten")
    with torch.no_grad():
        for tokens in (5, 3):
            inputs = torch.randn(3, 5, 8), torch.randn(3, tokens, 8)
            compare(fast, model, *inputs, src_key_padding_mask=ENDS)


def test_which_parameters_require_gradients_decides_it() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    fast, x = turbotx.optimize(encoder.eval(), backend="aten"), torch.randn(3, 5, 8)
    for asked in (True, False, True):
        encoder.requires_grad_(asked)
        values = compare(fast, encoder, x, src_key_padding_mask=ENDS)[0, 4]
        assert bool(values.any()) is asked
    assert fast.stats()["captures"] == 2
