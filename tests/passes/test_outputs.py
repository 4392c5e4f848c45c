"""Outputs: eager's strides and aliases; what a caller does to one reaches no other call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import turbotx
from turbotx.engine.optimize import engine_of

A, B = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 4).requires_grad_(False)
TABLE = torch.randn(3, 6)


def heads(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    return linear(x).view(*x.shape[:2], 2, -1).transpose(1, 2)


def of(x: Any, make: Callable[[Any], Any]) -> Any:
    return make(x)


CASES: dict[str, Callable[[torch.Tensor], Any]] = {
    "itself": lambda x: x,
    "a view": lambda x: (x[:, 1:], x.transpose(1, 2), x.unsqueeze(0).expand(3, -1, -1, -1)),
    "a clone": lambda x: (x.clone(), x),
    "equal calls": lambda x: (x + 1, x + 1),
    "one result twice": lambda x: of(x + 1, lambda y: (y, y, y[0], y.transpose(0, 1))),
    "packed products": lambda x: (A(x), B(x)),
    "packed heads": lambda x: (heads(x, A), heads(x, B)),
    "views of packed": lambda x: of(A(x), lambda k: (k, k[..., 2:], k[:, :1].expand_as(k), B(x))),
    "windows": lambda x: (x * 2).unfold(2, 3, 1),
    "transposed in": lambda x: x.transpose(1, 2) + 1,
    "transposed out": lambda x: (x + 1).permute(2, 0, 1),
    "made dense": lambda x: x.permute(2, 0, 1).contiguous(),
    "pieces": lambda x: (x * 3).chunk(2, -1),
    "a parameter": lambda x: (A.weight, A.weight.t(), A.bias[2:], x.sum()),
    "of parameters": lambda x: (A.weight.exp(), A.weight.exp()[1:].t(), TABLE.clone(), x.mean()),
    "a constant": lambda x: (torch.tensor([3.0, 4.0]), torch.tensor(2.0), x.shape[0]),
    "attention": lambda x: F.scaled_dot_product_attention(*(heads(x, A),) * 3),
    "einsum": lambda x: torch.einsum("bsh,oh->osb", x, A.weight),
    "by ATen": lambda x: (x.transpose(0, 1).cummax(0), torch.topk(x.transpose(1, 2), 2)),
}
INPUTS = {
    "dense": lambda: torch.randn(3, 5, 6),
    "another size": lambda: torch.randn(2, 4, 6),
    "a slice": lambda: torch.randn(2, 9, 6)[:, 2:7],
    "sequence first": lambda: torch.randn(5, 3, 6).transpose(0, 1),
}


def flat(tree: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(tree)


def layout(x: torch.Tensor) -> list[tuple[int, int]]:
    return [(n, s) for n, s in zip(x.shape, x.stride(), strict=True) if n > 1]


def memory(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", CASES)
def test_leaves_lie_and_alias_as_eagers(name: str) -> None:
    function = CASES[name]
    fast = turbotx.optimize(function)
    for given, make in INPUTS.items():
        x = make()
        mine, own = flat(fast(x)), flat(function(x))
        for k, (a, b) in enumerate(zip(mine, own, strict=True)):
            if not isinstance(b, torch.Tensor):
                assert a == b
                continue
            torch.testing.assert_close(a, b)
            # A window that shows elements twice is kept so only where nothing is copied.
            if name != "windows" or given in ("dense", "another size"):
                assert layout(a) == layout(b), (given, k)
            for outside in (x, A.weight, A.bias, TABLE):
                assert (memory(a) == memory(outside)) == (memory(b) == memory(outside)), (given, k)
            for j in range(k):
                if isinstance(own[j], torch.Tensor):
                    shared = memory(own[j]) == memory(b)
                    assert (memory(mine[j]) == memory(a)) == shared, (given, j, k)
                    if shared:
                        apart = b.data_ptr() - own[j].data_ptr()
                        assert a.data_ptr() - mine[j].data_ptr() == apart, (given, j, k)


FRESH = ["a clone", "equal calls", "packed heads", "of parameters", "a constant", "einsum"]


@pytest.mark.parametrize("name", FRESH)
def test_what_a_caller_writes_reaches_no_later_call(name: str) -> None:
    function = CASES[name]
    fast, x = turbotx.optimize(function), torch.randn(3, 5, 6)
    expected = flat(function(x))
    for _ in range(2):
        leaves = flat(fast(x))
        for mine, own in zip(leaves, expected, strict=True):
            torch.testing.assert_close(mine, own)
        for leaf in leaves[:1] if name == "a clone" else leaves:
            if isinstance(leaf, torch.Tensor):
                leaf.zero_()


def test_products_that_were_packed_can_be_viewed() -> None:
    for leaf in turbotx.optimize(lambda x: (A(x), B(x)))(torch.randn(2, 3, 6)):
        assert leaf.view(-1).shape == (leaf.numel(),)


def test_products_that_lie_so_already_are_not_copied() -> None:
    fast = turbotx.optimize(lambda x: (A(x), A(x).transpose(1, 2), F.gelu(B(x))))
    fast(torch.randn(2, 3, 6))
    (compiled,) = engine_of(fast).variants()
    assert not compiled.assembly.externs


def test_one_capture_serves_slices_and_repeats() -> None:
    fast = turbotx.optimize(CASES["packed products"])
    for x in (INPUTS["dense"](), INPUTS["a slice"](), torch.randn(3, 1, 6).expand(3, 4, 6)):
        fast(x)
    assert fast.stats()["captures"] == 1
    fast(INPUTS["sequence first"]())
    assert fast.stats()["captures"] == 2


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.conv(x).relu(), x.mean(1, keepdim=True) + x


def test_channels_last_comes_out_as_it_went_in() -> None:
    model = Images().eval()
    fast = turbotx.optimize(model)
    for x in (
        torch.randn(2, 3, 5, 7),
        torch.randn(2, 3, 6, 5).to(memory_format=torch.channels_last),
    ):
        for mine, own in zip(fast(x), model(x), strict=True):
            torch.testing.assert_close(mine, own)
            assert layout(mine) == layout(own)
