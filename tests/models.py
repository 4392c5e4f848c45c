"""Small random Hugging Face models and the rule that a result must meet.

In: an architecture's name. Out: a two-layer model with few channels, inputs with padding, and
`assert_as_exact_as_eager`: error against float64 at most 1.5 x eager's own, plus 2 ulp.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from benchmarks.parity import make_model


def small_model(
    architecture: str, dtype: torch.dtype = torch.float32, layers: int = 2
) -> torch.nn.Module:
    """A random model of few layers and 64 channels in evaluation mode."""
    return make_model(architecture, layers, small=True).to(dtype)


def token_inputs(batch: int, seq: int) -> dict[str, torch.Tensor]:
    """Token ids and a mask that pads the second row to half its length, the third to one token."""
    ids = torch.randint(3, 150, (batch, seq))
    mask = torch.ones(batch, seq, dtype=torch.long)
    if batch > 1:
        mask[1, max(1, seq // 2) :] = 0
    if batch > 2:
        mask[2, 1:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def leaves(output: Any) -> list[torch.Tensor]:
    found = torch.utils._pytree.tree_leaves(output)
    return [x for x in found if isinstance(x, torch.Tensor)]


def in_double(model: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(model).double()


def assert_as_exact_as_eager(ours: Any, eager: Any, exact: Any) -> None:
    """Error against float64 at most 1.5 x eager's own, plus two units in the last place."""
    for a, b, c in zip(leaves(ours), leaves(eager), leaves(exact), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.numel() == 0:
            continue
        unit = torch.finfo(a.dtype).eps * c.abs().max().item()
        allowed = 1.5 * (b.double() - c).abs().max().item() + 2 * unit
        worst = (a.double() - c).abs().max().item()
        assert worst <= allowed, f"error {worst:.3g}, allowed {allowed:.3g}"
