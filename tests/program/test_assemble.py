"""Launches: what the native code takes, what PyTorch runs, and their order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import turbotx
from turbotx.engine.optimize import engine_of
from turbotx.errors import CaptureError, IndexOutOfRangeError

X = torch.randn(3, 5, 8)


def kinds(fast) -> list[str]:
    (compiled,) = engine_of(fast).variants()
    return [x.kind for x in compiled.assembly.launches]


def check(function, *args, **tolerance):
    fast = turbotx.optimize(function)
    with torch.no_grad():
        expected = function(*args)
    ours = fast(*args)
    torch.testing.assert_close(ours, expected, **tolerance)
    for scale in (1, 2):  # other sizes, the same program
        others = [torch.cat([a] * scale) if a.dim() == 3 else a for a in args]
        torch.testing.assert_close(fast(*others), function(*others), **tolerance)
    return fast


def test_products_of_two_activations_run_through_pytorch() -> None:
    fast = check(lambda x, y: (x.exp() @ y.transpose(1, 2)).tanh(), X, X)
    assert kinds(fast) == ["kernel", "aten", "kernel"]


def test_an_op_without_a_row_runs_through_pytorch_and_is_listed() -> None:
    fast = check(lambda x: torch.sort(x.exp(), -1)[0] * 2, X)
    (compiled,) = engine_of(fast).variants()
    assert kinds(fast) == ["kernel", "aten", "kernel"]
    assert any("sort" in op for op, _ in compiled.assembly.externs)


def test_several_results_of_one_op() -> None:
    def function(x):
        values, places = torch.topk(x, 3)
        return values.exp(), places + 1

    check(function, X)


def test_a_result_that_nobody_uses() -> None:
    check(lambda x: torch.topk(x, 3)[1], X)


def test_a_view_that_needs_a_copy() -> None:
    linear = nn.Linear(15, 4).eval()

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(x.view(x.shape[0], 3, 5).transpose(1, 2).reshape(-1, 15))

    x = torch.randn(6, 15)
    model = Flat().eval()
    torch.testing.assert_close(turbotx.optimize(model)(x), model(x))


def test_views_of_a_copy() -> None:
    """Key heads repeated for groups, then transposed: only the repetition copies."""

    def scores(x):
        heads = x.exp()[:, :, None].expand(-1, -1, 2, -1).reshape(x.shape[0], -1, x.shape[2])
        return torch.bmm(x, heads.transpose(1, 2)), heads.transpose(1, 2)

    fast = check(scores, X)
    assert kinds(fast) == ["kernel", "aten", "aten"]


def test_a_linear_over_selected_tokens_reads_in_place() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x):
            return self.linear(x.exp()[:, 0])

    model = First().eval()
    fast = turbotx.optimize(model)
    torch.testing.assert_close(fast(X), model(X))
    assert kinds(fast) == ["kernel", "gemm"]


def test_a_weight_that_is_no_parameter() -> None:
    fast = check(lambda x, w: F.linear(x, w.exp()), X, torch.randn(4, 8))
    assert "gemm" not in kinds(fast)


def test_a_region_around_an_independent_gemm() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            first = self.a(x).exp()
            second = self.b(first)
            third = self.a(x + 1).exp() + first
            return second, third * 2

    model = Both().eval()
    for ours, theirs in zip(turbotx.optimize(model)(X), model(X), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_outputs_that_are_inputs_views_and_duplicates() -> None:
    def function(x):
        y = x.exp()
        return x, x[:, 0], y, y.transpose(1, 2), y

    check(function, X)


def test_integers_and_bools() -> None:
    check(lambda i: (i * 2 + 1, i > 3, (i > 3) & (i < 7), i // 2, i.float() / 3), torch.arange(12))


def test_sizes_that_depend_on_values_are_refused() -> None:
    with pytest.raises(CaptureError):
        turbotx.optimize(lambda x: torch.nonzero(x > 0).float().exp())(X)


def test_a_shape_that_an_index_cannot_serve() -> None:
    @turbotx.optimize
    def rows(x, y):
        return x[torch.arange(y.shape[0])] + y

    torch.testing.assert_close(rows(torch.ones(5, 3), torch.ones(4, 3)), 2 * torch.ones(4, 3))
    with pytest.raises(IndexOutOfRangeError, match="fails for"):
        rows(torch.ones(3, 3), torch.ones(4, 3))
