"""Attention over windows, and as einsum leaves it: one attention node, read where it lies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import turbotx
from tests.kernels.cpp.cpp_probe import needs_compiler
from tests.models import assert_as_exact_as_eager, in_double
from turbotx.engine.optimize import engine_of

WIDTH, HEADS = 8, 2


class Windows(nn.Module):
    """Each of a row's windows attends to itself, queries pooled by two, as in Hiera."""

    def __init__(self, windows: int = 3) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 3 * HEADS * WIDTH), nn.Linear(HEADS * WIDTH, 12)
        self.windows = windows

    def forward(self, x):
        qkv = self.qkv(x).view(x.shape[0], -1, self.windows, 3, HEADS, WIDTH)
        q, k, v = qkv.permute(3, 0, 4, 2, 1, 5).unbind(0)
        q = q.reshape(*q.shape[:3], 2, -1, WIDTH).max(3).values
        shares = (q * 0.3 @ k.transpose(-1, -2)).softmax(-1)
        out = (shares @ v).transpose(1, 3).reshape(x.shape[0], -1, HEADS * WIDTH)
        return self.out(out).tanh()


class Blocks(nn.Module):
    """Blocks of four places attend to their neighbours too, by einsum, as in LongT5."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, HEADS * WIDTH) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(1, 1, HEADS, 4, 12))

    def forward(self, x, mask):
        def blocks(y):
            y = y.view(x.shape[0], -1, HEADS, WIDTH)
            y = F.pad(y, (0, 0, 0, 0, 0, -y.shape[1] % 4))
            return y.view(x.shape[0], -1, 4, HEADS, WIDTH)

        def beside(y):
            y = F.pad(y, (0, 0) * (y.dim() - 2) + (1, 1, 0, 0))
            return torch.cat([y[:, :-2], y[:, 1:-1], y[:, 2:]], 2)

        q, k, v = blocks(self.q(x)), beside(blocks(self.k(x))), beside(blocks(self.v(x)))
        seen = F.pad(mask, (0, -x.shape[1] % 4)).view(x.shape[0], -1, 4)
        seen = beside(seen)[:, :, None, None, :]
        scores = torch.einsum("...qhd,...khd->...hqk", q, k)
        scores = scores + (self.bias + torch.where(seen > 0, 0.0, -1e10))
        out = torch.einsum("...hqk,...khd->...qhd", scores.softmax(-1), v)
        return out.reshape(x.shape[0], -1, HEADS * WIDTH)[:, : x.shape[1]]


def kinds(fast) -> list[str]:
    compiled = engine_of(fast).variants()[0]
    return [launch.kind for launch in compiled.assembly.launches]


@needs_compiler
@pytest.mark.parametrize("windows", [1, 3])
def test_windows_are_batches(windows: int) -> None:
    module = Windows(windows).eval()
    fast, exact = turbotx.optimize(module), in_double(module)
    for batch, length in ((2, 4), (1, 2), (1, 10), (3, 6)):
        x = torch.randn(batch, length * windows, 12)
        with torch.no_grad():
            assert_as_exact_as_eager(fast(x), module(x), exact(x.double()))
    found = kinds(fast)
    assert found.count("attention") == 1 and "product" not in found
    # q, k and v of several windows are copied; the result is read as it lies.
    assert "aten" not in found[found.index("attention") :]
    assert windows > 1 or "aten" not in found


@needs_compiler
def test_blocks_beside_each_other_by_einsum() -> None:
    module = Blocks().eval()
    fast, exact = turbotx.optimize(module), in_double(module)
    for batch, length in ((2, 9), (1, 1), (1, 4), (3, 13)):
        x = torch.randn(batch, length, 12)
        mask = (torch.arange(length) < torch.tensor([length, 3, 1])[:batch, None]).float()
        with torch.no_grad():
            ours, eager = fast(x, mask), module(x, mask)
            assert_as_exact_as_eager(ours, eager, exact(x.double(), mask.double()))
    assert kinds(fast).count("attention") == 1


class Biased(nn.Module):
    def __init__(self, bias: tuple[int, ...]) -> None:
        super().__init__()
        self.into, self.bias = nn.Linear(6, WIDTH), nn.Parameter(torch.randn(*bias, 5, 5))

    def forward(self, x, y):
        q, k = self.into(x), self.into(y)
        return (q @ k.mT + self.bias).softmax(-1) @ k


@pytest.mark.parametrize(
    ("keys", "bias", "found"),
    [
        ((2, 3, 4), (4,), True),
        ((2, 3, 4), (), True),
        ((2, 3, 4), (1, 3, 4), False),
        ((1, 3, 4), (1, 1, 4), False),
    ],
)
def test_operands_vary_over_all_of_the_merged_dims_or_none(keys, bias, found) -> None:
    module = Biased(bias).eval()
    inputs = torch.randn(2, 3, 4, 5, 6), torch.randn(*keys, 5, 6)
    fast = turbotx.optimize(module, backend="aten")
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), module(*inputs))
    assert ("attention" in kinds(fast)) == found
