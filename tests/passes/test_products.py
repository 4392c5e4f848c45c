"""Attention that no kernel computes whole: products of ours around one region."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import turbotx
from tests.kernels.cpp.cpp_probe import needs_compiler
from tests.models import assert_as_exact_as_eager, in_double
from turbotx.engine.optimize import engine_of


def hidden_by_products(q, k, v, keys):
    """As OpenAI's GPT: what is hidden is multiplied by zero, and a number is added."""
    band = torch.tril(torch.ones(q.shape[2], q.shape[2], dtype=q.dtype))
    hidden = torch.zeros(keys.shape, dtype=q.dtype).masked_fill(~keys, torch.finfo(q.dtype).min)
    scores = (q @ k.mT) * 0.4 * band - 1e4 * (1 - band) + hidden[:, None, None]
    return (scores.softmax(-1) @ v,)


def two_products_for_two_values(q, k, v, keys):
    """As LiLT: scores of two pairs, added in either order, share out the values of both."""
    text, layout = q @ k.mT * 0.4, q[..., :3] @ v[..., :3].mT * 0.7
    hidden = torch.zeros(keys.shape, dtype=q.dtype).masked_fill(~keys, -torch.inf)[:, None, None]
    one, other = (text + layout + hidden).softmax(-1), (layout + text + hidden).softmax(-1)
    return one @ v, other @ k[..., :3]


FORMS = {f.__name__: f for f in (hidden_by_products, two_products_for_two_values)}


class Attend(nn.Module):
    def __init__(self, inner) -> None:
        super().__init__()
        self.inner, self.into = inner, nn.Linear(16, 3 * 32)

    def forward(self, x, keys):
        q, k, v = self.into(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return [y.transpose(1, 2).flatten(2) for y in self.inner(q, k, v, keys)]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_products_are_ours(form: str, dtype: torch.dtype) -> None:
    module = Attend(FORMS[form]).to(dtype).eval()
    fast, exact = turbotx.optimize(module), in_double(module)
    for batch, length in ((2, 5), (1, 1), (3, 7)):
        x = torch.randn(batch, length, 16, dtype=dtype)
        keys = torch.arange(length) < torch.tensor([length, 2, 1])[:batch, None]
        with torch.no_grad():
            assert_as_exact_as_eager(fast(x, keys), module(x, keys), exact(x.double(), keys))
    (compiled,) = engine_of(fast).variants()
    found = [launch.kind for launch in compiled.assembly.launches]
    pairs = 1 if form == "hidden_by_products" else 2
    assert found.count("product") == 2 * pairs
    assert "attention" not in found and "aten" not in found


@pytest.mark.parametrize(
    "inner",
    [
        lambda q, k, v, keys: [(q @ k.mT).softmax(-2) @ v],
        lambda q, k, v, keys: [(q @ k.mT).exp() @ v],
        lambda q, k, v, keys: [((q @ k.mT) * (k[:1] @ q.mT)).softmax(-1) @ v],
    ],
    ids=["softmax over queries", "no softmax", "products over two batches"],
)
def test_must_not_fire(inner) -> None:
    module, x, keys = Attend(inner).eval(), torch.randn(2, 5, 16), torch.ones(2, 5)
    fast = turbotx.optimize(module, backend="aten")
    with torch.no_grad():
        torch.testing.assert_close(fast(x, keys), module(x, keys))
    (compiled,) = engine_of(fast).variants()
    assert "product" not in {launch.kind for launch in compiled.assembly.launches}
