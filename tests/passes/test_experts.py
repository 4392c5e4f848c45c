"""Experts: grouped products and the order of their rows, as launches of their own.

In: a router with experts as transformers writes them, and one changed in some way. Out: results
beside float64, which launches they are, what stays PyTorch's.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import grouped_mm, one_hot, silu

import turbotx
from tests.kernels.cpp.cpp_probe import needs_compiler
from tests.models import assert_as_exact_as_eager
from turbotx.engine.optimize import engine_of
from turbotx.errors import IndexOutOfRangeError
from turbotx.ir.expert_ops import grouped_linear, route

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Experts(nn.Module):
    """top_k of `experts` for each row; `change`: what is other than transformers has it."""

    def __init__(self, experts=6, top_k=2, change="", dtype=torch.float32) -> None:
        super().__init__()
        self.experts, self.top_k, self.change = experts, top_k, change
        self.router = nn.Linear(24, experts)
        self.up = nn.Parameter((torch.randn(experts, 48, 24) / 5).to(dtype))
        self.down = nn.Parameter((torch.randn(experts, 24, 40) / 5).to(dtype))

    def forward(self, x):
        weights, chosen = self.choose(x)
        ids, order = chosen.reshape(-1).sort(descending=self.change == "descending")
        numbers = ids.int() if x.is_cuda else ids.float()
        counts = numbers.histc(bins=self.experts, min=0, max=self.experts - 1)
        if self.change == "counted up to":
            counts = numbers.histc(bins=self.experts, min=0, max=self.experts)
        ends = counts.cumsum(0, dtype=torch.int32)
        gate, factor = grouped_mm(x[order // self.top_k], self.up.mT, offs=ends).chunk(2, -1)
        out = grouped_mm(silu(gate) * factor, self.down, offs=ends)
        out = out * weights.reshape(-1)[order][:, None]
        place = torch.empty_like(order)
        place[order] = torch.arange(order.shape[0], device=x.device)
        return out[place].view(x.shape[0], self.top_k, 40).sum(1), ids

    def choose(self, x):
        weights, chosen = self.router(x.float()).softmax(-1).topk(self.top_k)
        return weights.to(x.dtype), chosen % 5 if self.change == "computed" else chosen

    def in_double(self, x):
        """The same, every expert over every row, chosen as in x's own dtype."""
        weights, chosen = self.choose(x)
        gate, factor = torch.einsum("rk,enk->ren", x.double(), self.up.double()).chunk(2, -1)
        out = torch.einsum("ren,enk->rek", silu(gate) * factor, self.down.double())
        shares = (one_hot(chosen, self.experts) * weights.double()[..., None]).sum(1)
        return (out * shares[..., None]).sum(1), chosen.reshape(-1).sort()[0].double()


def kinds(fast):
    (compiled,) = engine_of(fast).variants()
    return [x.kind for x in compiled.assembly.launches], compiled.assembly.externs


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("experts", [3, 40])
def test_two_launches_and_an_order(experts: int, dtype: torch.dtype) -> None:
    module = Experts(experts, dtype=dtype)
    fast = turbotx.optimize(module.eval())
    for rows in (5, 1, 70, 2):
        x = torch.randn(rows, 24, dtype=dtype)
        with torch.no_grad():
            (ours, ids), (eager, _), (exact, order) = fast(x), module(x), module.in_double(x)
        assert torch.equal(ids.double(), order)
        assert_as_exact_as_eager(ours, eager, exact)
    found, externs = kinds(fast)
    assert (found.count("route"), found.count("aten")) == (1, 1)
    assert [name for name, _ in externs] == ["aten.topk.default"]
    names = [x.name for x in engine_of(fast).variants()[0].assembly.launches]
    assert {"grouped_linear_silu_mul_0", "grouped_linear_0"} <= set(names)


@needs_compiler
def test_no_rows() -> None:
    module = Experts()
    fast = turbotx.optimize(module.eval())
    for rows in (0, 3, 0):
        ours, eager = fast(torch.randn(rows, 24)), module(torch.randn(rows, 24))
        assert [x.shape for x in ours] == [x.shape for x in eager]


@needs_compiler
@pytest.mark.parametrize("change", ["computed", "descending", "counted up to"])
def test_another_order_is_left_to_pytorch(change: str) -> None:
    module = Experts(change=change)
    fast = turbotx.optimize(module.eval())
    for rows in (5, 1, 9):
        x = torch.randn(rows, 24)
        with torch.no_grad():
            (ours, ids), (eager, expected) = fast(x), module(x)
        assert torch.equal(ids, expected)
        torch.testing.assert_close(ours, eager)
    assert "route" not in kinds(fast)[0]


@needs_compiler
def test_both_products_and_either_layout_are_one_launch() -> None:
    pytest.importorskip("transformers.integrations.moe")
    weight = nn.Parameter(torch.randn(3, 8, 16))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x, ends):
            theirs = torch.ops.transformers.grouped_mm_fallback(x, self.weight.mT, ends)
            return theirs, grouped_mm(theirs, self.weight, offs=ends)

    fast = turbotx.optimize(Both().eval())
    for counts in ((2, 0, 4), (0, 0, 3), (1, 0, 0)):
        ends = torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32)
        x = torch.randn(sum(counts), 16)
        with torch.no_grad():
            one = grouped_linear(x.double(), weight.double(), ends)
            both = one, grouped_linear(one, weight.double().mT, ends)
            assert_as_exact_as_eager(fast(x, ends), Both()(x, ends), both)
    assert kinds(fast)[0] == ["gemm", "gemm"]


@needs_compiler
def test_rows_of_no_expert_are_zero_and_wrong_ends_are_told() -> None:
    weight = torch.randn(2, 40, 16)

    @turbotx.optimize
    def fast(x, ends):
        return grouped_mm(x, weight.mT, offs=ends)

    x = torch.randn(7, 16)
    out = fast(x, torch.tensor([2, 4], dtype=torch.int32))
    assert (out[4:] == 0).all()
    torch.testing.assert_close(out[2:4], x[2:4] @ weight[1].T)
    for wrong in ([2, 8], [3, 2], [-1, 4]):
        with pytest.raises(IndexOutOfRangeError, match=r"'ends'.*\+ 1, none below the one before"):
            fast(x, torch.tensor(wrong, dtype=torch.int32))


@pytest.mark.parametrize("backend", ["aten", "auto"])
def test_weights_that_are_no_parameters_are_pytorchs(backend: str) -> None:
    def product(x, weight, ends):
        return grouped_mm(x, weight.mT, offs=ends).relu()

    fast = turbotx.optimize(product, backend=backend)
    x, weight = torch.randn(5, 16), torch.randn(2, 16, 16)
    ends = torch.tensor([1, 5], dtype=torch.int32)
    torch.testing.assert_close(fast(x, weight, ends), product(x, weight, ends))


def test_what_pytorch_runs_for_an_order_is_one() -> None:
    chosen = torch.tensor([3, 0, 3, 1, 0])
    order, place, ends = route(chosen, experts=5)
    assert order.tolist() == [1, 4, 3, 0, 2] and place[order].tolist() == [0, 1, 2, 3, 4]
    assert ends.tolist() == [2, 3, 3, 5, 5] and ends.dtype is torch.int32
