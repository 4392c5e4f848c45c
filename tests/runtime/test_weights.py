"""Weights: what derives from parameters is made again when they change, and only then."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import turbotx
from turbotx.runtime import weights as weights_module

X = torch.randn(4, 8)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.a(x).tanh() + self.b(x).tanh()


def weights_of(fast):
    (compiled,) = fast._engine.variants()
    return compiled.program.runtime.weights


def test_unchanged_parameters_are_looked_at_only() -> None:
    fast = turbotx.optimize(Packed().eval())
    fast(X)
    before = weights_of(fast).version
    fast(X)
    assert weights_of(fast).version == before
    assert weights_of(fast).refresh() is False


def test_a_change_of_one_piece_repacks_the_whole() -> None:
    model = Packed().eval()
    fast = turbotx.optimize(model)
    fast(X)
    before = weights_of(fast).version
    with torch.no_grad():
        model.b.weight.add_(1)
    torch.testing.assert_close(fast(X), model(X))
    assert weights_of(fast).version == before + 1


def test_a_call_beside_one_that_derives_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Packed().eval()
    fast = turbotx.optimize(model)
    fast(X)
    weights = weights_of(fast)
    before, compute, entered, go = (
        weights.version, weights_module._compute, threading.Event(), threading.Event()
    )  # fmt: skip

    def compute_slowly(node, tensors):
        entered.set()
        assert go.wait(60)
        return compute(node, tensors)

    monkeypatch.setattr(weights_module, "_compute", compute_slowly)
    with torch.no_grad():
        model.b.weight.add_(1)
    seen: list[int] = []
    calls = [
        threading.Thread(target=lambda: (weights.refresh(), seen.append(weights.version)))
        for _ in range(2)
    ]
    calls[0].start()
    assert entered.wait(60)
    calls[1].start()
    calls[1].join(0.2)
    assert not seen  # neither went on with the packed weights of before
    go.set()
    for call in calls:
        call.join()
    assert seen == [before + 1] * 2


class Parts(nn.Module):
    """Queries by the first rows of a weight, keys and values by the rest, as in PyTorch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(24))

    def forward(self, x, memory):
        (first, rest), (b, c) = self.weight.split([8, 16]), self.bias.split([8, 16])
        return nn.functional.linear(x, first, b), nn.functional.linear(memory, rest, c)


def test_products_read_parts_of_one_weight() -> None:
    model = Parts().eval()
    fast, memory = turbotx.optimize(model), torch.randn(3, 8)
    for ours, theirs in zip(fast(X, memory), model(X, memory), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_prepared_constants_are_not_the_users_tensors() -> None:
    model = Packed().eval()
    fast = turbotx.optimize(model)
    fast(X)
    own = {p.data_ptr() for p in model.parameters()}
    tensors = weights_of(fast).tensors
    prepared = [t for name, t in tensors.items() if name.startswith("cat")]
    assert prepared
    assert not own & {t.data_ptr() for t in prepared}


def test_half_precision_weights() -> None:
    model = Packed().to(torch.bfloat16).eval()
    x = X.to(torch.bfloat16)
    torch.testing.assert_close(turbotx.optimize(model)(x), model(x), rtol=2e-2, atol=2e-2)
