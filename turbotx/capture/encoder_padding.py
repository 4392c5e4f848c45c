"""Padding of `nn.TransformerEncoder`: zeros, as eager's nested tensors leave them.

In: a trace. Out: the same, with the encoder's results at padded positions as in eager mode without
gradients, where PyTorch skips padding in every layer and fills it with zeros at the end
(`TransformerEncoder.forward`; not under a trace)::

    encoder(x, src_key_padding_mask=mask)[0]  ->  [[0.3, -1.2], [0.8, 0.1], [0.0, 0.0]]
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

from turbotx.capture.module_state.gradients import require_gradients

_forward = nn.TransformerEncoder.forward


@contextmanager
def padding_as_eager() -> Iterator[None]:
    """Context manager: make traced encoders return what they return in eager mode at padded
    positions."""
    with mock.patch.object(nn.TransformerEncoder, "forward", _padded_forward):
        yield


def _padded_forward(
    self: nn.TransformerEncoder, src: Tensor, mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None, is_causal: bool | None = None,
) -> Tensor:  # fmt: skip
    """`nn.TransformerEncoder.forward` with dense tensors in place of its nested ones."""
    if src_key_padding_mask is None or mask is not None or not _leaves_padding_out(self, src):
        return _forward(self, src, mask, src_key_padding_mask, is_causal)
    padded = src_key_padding_mask.bool()
    # Nested tensors hold the first positions of each sequence, as many as are not padded ...
    place = torch.arange(padded.shape[1], device=padded.device)
    behind = place >= padded.logical_not().sum(1, keepdim=True)
    if getattr(self, "mask_check", True):  # ... and are used if that drops exactly the padding
        left_out = behind & (behind == padded).all()
        keys = padded if src_key_padding_mask.dtype == torch.bool else (
            src_key_padding_mask.masked_fill(left_out, -torch.inf))  # fmt: skip
    else:
        left_out = keys = behind
    output = src
    for layer in self.layers:
        output = layer(output, src_key_padding_mask=keys)
    output = output.masked_fill(left_out.unsqueeze(-1), 0.0)
    return output if self.norm is None else self.norm(output)


def _leaves_padding_out(encoder: nn.TransformerEncoder, src: Tensor) -> bool:
    """Return whether eager mode uses nested tensors for this input, apart from the mask's
    values."""
    layer = encoder.layers[0]
    able = torch.backends.mha.get_fastpath_enabled() and getattr(
        encoder, "use_nested_tensor", False
    )
    if not able or layer.training or src.dim() != 3 or torch.is_autocast_enabled():
        return False
    return not (torch.is_grad_enabled() and require_gradients(layer))
