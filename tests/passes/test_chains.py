"""Attention written out in many ways: each is one attention node, and computes what eager does."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import turbotx
from tests.kernels.cpp.cpp_probe import needs_compiler
from tests.passes.test_attention import Attend, X, recognized
from turbotx.engine.optimize import engine_of
from turbotx.ir.fx_nodes import shape

LOW = torch.finfo(torch.float32).min
KEYS = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]


def merged(x):
    return x.reshape(-1, *x.shape[2:])


def positions(x):
    return torch.arange(x.shape[2])


def capped(q, k, v, keys):
    scores = (q @ k.transpose(2, 3) * 0.3 / 2.0).tanh() * 2.0
    scores = scores + torch.zeros(keys.shape).masked_fill(~keys, LOW)[:, None, None]
    return F.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


def by_batches_of_heads(q, k, v, keys):
    """Scores of (batch * heads, q, k), distances times a slope, then a mask of four dims."""
    batch, heads, length, _ = q.shape
    distance = (SLOPES * positions(q)).expand(batch, -1, -1, -1).reshape(-1, 1, length)
    scores = torch.baddbmm(distance, merged(q), merged(k).transpose(1, 2), beta=1.0, alpha=0.3)
    scores = scores.view(batch, heads, length, length)
    scores = scores.masked_fill(~keys[:, None, None], -math.inf)
    out = torch.bmm(scores.softmax(-1).view(-1, length, length), merged(v))
    return out.view(batch, heads, length, -1)


def twice_hidden(q, k, v, keys):
    """One mask chosen, the other added: where both hide, scores are minus infinity."""
    seen = positions(q) <= positions(q)[:, None]
    scores = torch.where(seen, q @ k.transpose(2, 3), torch.tensor(LOW))
    return (scores + torch.where(keys[:, None, None], 0.0, LOW)).softmax(-1) @ v


def minus_a_penalty(q, k, v, keys):
    scores = 0.3 * torch.matmul(q, k.mT)
    return (scores - 1e30 * (~keys)[:, None, None].float()).softmax(-1) @ v


def scaled_operands(q, k, v, keys):
    width = torch.sqrt(torch.tensor(8 * 2, dtype=torch.float32))
    bias = (q * 0.1) @ k.transpose(2, 3)
    scores = q @ (k.transpose(2, 3) / width) + bias.cumsum(-1)
    return scores.masked_fill(~keys[:, None, None], LOW).softmax(-1) @ v


def shifted_by_the_largest(q, k, v, keys):
    """CogView's, which no half overflows: scores are made small, shifted, and made large again."""
    scores = (q / 3.0) @ k.mT + SLOPES * positions(q)
    scores = (scores + torch.where(keys, 0.0, LOW)[:, None, None]) / 32
    return ((scores - scores.amax(-1).unsqueeze(-1)) * 32).softmax(-1) @ v


def none_below_the_least(q, k, v, keys):
    """A query that sees no key gets the mean, as where numbers hide, although infinity does."""
    hidden = torch.where(positions(q) <= positions(q)[:, None], SLOPES * 0.5, -math.inf)
    scores = (q @ k.mT).masked_fill(~keys[:, None, None], -math.inf) * 0.5 + hidden
    return torch.max(torch.full((), LOW), scores).softmax(-1) @ v


def with_sinks(q, k, v, keys):
    """Hidden keys come first, as left padding: some queries see none, and give all to the sink."""
    seen = (positions(q) <= positions(q)[:, None]) & keys.flip(-1)[:, None, None]
    scores = q @ k.mT * 0.4 + torch.where(seen, 0.0, LOW)
    sinks = torch.tensor([0.3, 9.0, -math.inf, -2.0]).reshape(1, -1, 1, 1)
    logits = torch.cat([scores, sinks.expand(*q.shape[:3], 1)], -1)
    logits = logits - logits.amax(-1, keepdim=True)
    return logits.softmax(-1)[..., :-1] @ v


FORMS = {
    f.__name__: f
    for f in (
        capped, by_batches_of_heads, twice_hidden, minus_a_penalty, scaled_operands,
        shifted_by_the_largest, none_below_the_least, with_sinks,
    )
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_is_one_attention(form: str) -> None:
    (node,) = recognized(FORMS[form], KEYS)
    assert node.kwargs.get("softcap", 0.0) == (2.0 if form == "capped" else 0.0)


def test_sinks_leave_the_mask_to_the_kernel() -> None:
    (node,) = recognized(with_sinks, KEYS)
    assert node.kwargs["causal"] and node.kwargs["blind_mean"] and node.args[4] is None
    assert [int(n) for n in shape(node.args[5])] == [4]


def test_heads_need_not_be_known() -> None:
    class Plain(nn.Module):
        """One head: (batch, length, width) all along."""

        def __init__(self) -> None:
            super().__init__()
            self.into = nn.Linear(16, 16)

        def forward(self, x):
            x = self.into(x)
            return (x @ x.mT / 4).softmax(-1) @ x.tanh()

    module, x = Plain().eval(), torch.randn(3, 5, 16)
    fast = turbotx.optimize(module, backend="aten")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), module(x))
    (compiled,) = engine_of(fast).variants()
    assert "attention" in {launch.kind for launch in compiled.assembly.launches}


@pytest.mark.parametrize(
    "inner",
    [
        lambda q, k, v: (q @ k.mT).masked_fill(positions(q) > 2, -100.0).softmax(-1) @ v,
        lambda q, k, v: (q @ k.mT * -1.0).softmax(-2) @ v,
        lambda q, k, v: (q @ k.mT).exp().softmax(-1) @ v,
        lambda q, k, v: ((q @ k.mT + 1.5 * (positions(q) > 2)).tanh()).softmax(-1) @ v,
        lambda q, k, v: (q @ k.mT - (k @ q.mT).amax(-1, True)).softmax(-1).cumsum(-1) @ v,
        lambda q, k, v: torch.max(q @ k.mT, torch.tensor(-1.0)).softmax(-1) @ v,
        lambda q, k, v: torch.cat([q @ k.mT, q[..., :1]], -1).softmax(-1)[..., :-1] @ v,
        lambda q, k, v: torch.cat([q @ k.mT, q[..., :2]], -1).softmax(-1)[..., :-2] @ v,
    ],
    ids=[
        "a fill that hides nothing",
        "softmax over queries",
        "exp",
        "tanh of a bias",
        "shares summed up",
        "scores bounded",
        "a sink of each query's own",
        "two sinks",
    ],
)
def test_must_not_be_one(inner) -> None:
    assert recognized(inner) == []


@pytest.fixture(scope="module")
def results() -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Every form's result, by eager and by one compiled program, at two shapes."""

    class Every(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.forms = nn.ModuleList(Attend(inner) for inner in FORMS.values())

        def forward(self, x, keys):
            return [form(x, keys) for form in self.forms]

    every = Every().eval()
    fast = turbotx.optimize(every)
    calls = [(X, KEYS), (X[:1, :1], KEYS[:1, :1])]
    with torch.no_grad():
        return [(fast(*call), every(*call)) for call in calls]


@needs_compiler
@pytest.mark.parametrize("form", FORMS)
def test_computes_what_eager_does(form: str, results) -> None:
    for ours, eager in results:
        k = list(FORMS).index(form)
        torch.testing.assert_close(ours[k], eager[k], rtol=2e-5, atol=2e-6)
