"""Weights: what derives from parameters is made again when they change, and only then."""

from __future__ import annotations

import torch
from torch import nn

import turbotx

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
