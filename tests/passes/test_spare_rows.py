"""Which dims of a packed call may be larger than they are: rows that are added change no other.

In: models whose pooled results keep batch rows apart, and such as do not. Out: the dims that are
spare; a model that computes with the size of its batch has its own program for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import turbotx
from tests.engine.test_packed import model_of
from turbotx.engine.optimize import engine_of

Head = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Pooled(nn.Module):
    """Sums by sequence, and what a head makes of them."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(60, 8), head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids) * attention_mask[:, :, None]
        return self.head(x.sum(1), attention_mask.sum(1, keepdim=True))


HEADS: dict[str, tuple[Head, bool]] = {
    "mean": (lambda x, n: x / n.clamp(min=1), True),
    "norm": (lambda x, n: nn.functional.normalize(x, dim=-1), True),
    "softmax of a row": (lambda x, n: x.softmax(1), True),
    "reshaped": (lambda x, n: x.view(x.shape[0], 2, 4).transpose(1, 2), True),
    "softmax over texts": (lambda x, n: x.softmax(0), False),
    "less the mean of all": (lambda x, n: x - x.mean(0, keepdim=True), False),
    "times their number": (lambda x, n: x * x.shape[0], False),
    "similarity": (lambda x, n: x @ x.mT, False),
    "turned round": (lambda x, n: x.flip(0), False),
    "merged": (lambda x, n: x.mT.reshape(-1), False),
}


def packing_of(fast: Any) -> Any:
    return engine_of(fast).variants()[0].program.packing


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_batch_rows_are_spare_where_they_are_apart(name: str) -> None:
    head, apart = HEADS[name]
    fast = turbotx.optimize(Pooled(head).eval(), padding="packed")
    fast(torch.randint(0, 60, (3, 5)), torch.ones(3, 5, dtype=torch.int64))
    spare = packing_of(fast).spare
    assert ("input_ids_d0" in spare or "batch" in spare) == apart, spare


@pytest.mark.parametrize("family", ["bert", "t5"])
@torch.no_grad()
def test_models_have_spare_rows_and_columns(family: str) -> None:
    _, fast = model_of(family)
    fast(input_ids=torch.randint(5, 60, (2, 5)), attention_mask=torch.ones(2, 5, dtype=torch.int64))
    assert {"batch", "seq"} <= set(packing_of(fast).spare)


class Biased(nn.Module):
    """Attention with a bias by distance, or by a share of all columns."""

    def __init__(self, by_share: bool) -> None:
        super().__init__()
        self.table, self.by_share = nn.Embedding(60, 8), by_share

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x, place = self.table(input_ids)[:, None], torch.arange(input_ids.shape[1])
        bias = (place[None, :] - place[:, None]) * 0.1
        bias = bias / input_ids.shape[1] if self.by_share else bias
        shown = attention_mask[:, None, None, :].bool()
        mask = torch.where(shown, bias[None, None], torch.finfo(x.dtype).min)
        return nn.functional.scaled_dot_product_attention(x, x + 1, x, mask)[:, 0]


@pytest.mark.parametrize("by_share", [False, True])
@torch.no_grad()
def test_columns_are_spare_where_distances_alone_count(by_share: bool) -> None:
    model = Biased(by_share).eval()
    fast = turbotx.optimize(model, padding="packed")
    for n in (5, 1, 40):
        ids, mask = torch.randint(5, 60, (2, n)), torch.ones(2, n, dtype=torch.int64)
        mask[1, max(1, n // 2) :] = 0
        ours, theirs = (f(input_ids=ids, attention_mask=mask) for f in (fast, model))
        torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-5, atol=1e-5)
    assert ("seq" in packing_of(fast).spare) != by_share
