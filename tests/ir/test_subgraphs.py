"""Ops that are given graphs run through PyTorch, are listed, and serve every size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention

import turbotx


class Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        found = torch.cond(
            x.mean() > 1, lambda t: self.up(t).tanh(), lambda t: self.down(t) * t.shape[0], (x,)
        )
        return torch.relu(found) * 2


def doubled(x: torch.Tensor) -> torch.Tensor:
    _, y = while_loop(lambda i, t: i < 3, lambda i, t: (i + 1, t * 2), (torch.tensor(0), x.exp()))
    return y + 1


def biased(q: torch.Tensor) -> torch.Tensor:
    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + (i - j) * 0.1

    return flex_attention(q * 2, q, q.tanh(), score_mod=score) + 1


@pytest.mark.filterwarnings("ignore:.*flex_attention")
@pytest.mark.parametrize(
    ("model", "shapes", "listed"),
    [
        (Chooses().eval().requires_grad_(False), ((3, 6), (5, 6), (1, 6)), "cond"),
        (doubled, ((2, 3), (4, 5), (1, 3)), "while_loop"),
        (biased, ((1, 2, 16, 16), (2, 2, 24, 16)), "flex_attention"),
    ],
)
def test_they_run_and_are_listed(model: Any, shapes: Any, listed: str) -> None:
    fast = turbotx.optimize(model)
    for shape in shapes:
        for sign in (1, -1):
            x = torch.randn(*shape).abs() * sign
            torch.testing.assert_close(fast(x), model(x))
    report = turbotx.explain(model, torch.randn(*shapes[0]))
    reasons = {entry.op: entry.reason for entry in report.externs}
    assert reasons[f"higher_order.{listed}"].endswith("is given graphs, which PyTorch runs")


def test_both_of_two_calls_stay() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        one = torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (x,))
        return one + torch.cond(x.sum() > 0, lambda t: t * 3, lambda t: t * 5, (x,))

    fast = turbotx.optimize(model)
    for x in (torch.ones(2, 3), -torch.ones(3, 3)):
        torch.testing.assert_close(fast(x), model(x))


@pytest.mark.filterwarnings("ignore:.*flex_attention")
def test_guards_of_a_graph_are_checked_by_the_call_alone() -> None:
    def grouped(q: torch.Tensor, k: torch.Tensor) -> Any:
        return flex_attention(q, k, k, enable_gqa=True)

    fast = turbotx.optimize(grouped)
    for batch, length in ((2, 16), (1, 24)):
        q = torch.randn(batch, 4, length, 16)
        torch.testing.assert_close(fast(q, q[:, :2]), grouped(q, q[:, :2]))
