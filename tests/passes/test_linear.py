"""GEMM rewrites: packing projections of one input, freeing biases, reading through reshapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import turbotx
from tests.graphs import calls, captured_graph
from turbotx.capture.trace import capture
from turbotx.engine.optimize import engine_of
from turbotx.passes.canonicalize import canonicalize
from turbotx.passes.linear import (
    free_biases,
    lift_permutations,
    lift_views,
    pack_linears,
    use_linear,
    use_multiplication,
)

X = torch.randn(2, 3, 8)


class Projections(nn.Module):
    def __init__(self, biases: tuple[bool, ...], finish) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(8, 4 + k, bias=b) for k, b in enumerate(biases)])
        self.finish = finish

    def forward(self, x):
        return self.finish(*[part(x) for part in self.parts])


def rewritten(module: nn.Module, *passes):
    captured = capture(module.eval(), (X,), {})
    graph = captured.graph_module.graph
    canonicalize(graph)
    for rewrite in passes:
        rewrite(graph)
    canonicalize(graph)
    graph.lint()
    return captured.graph_module


def run(graph_module, x):
    graph_module.recompile()
    return graph_module(x)


def test_three_projections_are_one_gemm() -> None:
    module = Projections((True, True, True), lambda a, b, c: (a.exp(), b.exp(), c.exp()))
    packed = rewritten(module, pack_linears)
    assert calls(packed.graph).count("linear") == 1
    for ours, theirs in zip(run(packed, X), module(X), strict=True):
        torch.testing.assert_close(ours, theirs)


class Chained(nn.Module):
    """Down to two, up from each by two: the inputs of the second pairs are pieces of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Linear(8, n, bias=False) for n in (4, 6)])
        self.up = nn.ModuleList([nn.Linear(n, 8, bias=b) for n in (4, 6) for b in (True, True)])

    def forward(self, x):
        low = [part(x) for part in self.down]
        high = [part(low[k // 2]) for k, part in enumerate(self.up)]
        return (*high, *(torch.tanh(part(high[0])) for part in self.down))


def test_projections_of_projections_are_packed_in_turn() -> None:
    module = Chained()
    packed = rewritten(module, pack_linears)
    assert calls(packed.graph).count("linear") == 4
    for ours, theirs in zip(run(packed, X), module(X), strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(turbotx.optimize(module)(X), module(X), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_bias_that_comes_from_another_projection_stays_apart() -> None:
    module = Projections((True, True), None)
    weight = torch.randn(3, 8)

    def function(x):
        a, b = module.parts[0](x), module.parts[1](x)
        return a, nn.functional.linear(x, weight, b[0, 0, :3] + a[0, 0, :3])

    for ours, theirs in zip(turbotx.optimize(function)(X), function(X), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_bias_of_one_number_is_added_apart() -> None:
    w, v, one, many = torch.randn(8, 5), torch.randn(8, 5), torch.randn(1), torch.randn(5)

    def function(x):
        x = x.flatten(0, 1)
        return torch.addmm(one, x, w).exp(), torch.addmm(many, x, v), torch.addmm(one, x, v)

    for ours, theirs in zip(turbotx.optimize(function)(X), function(X), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_biased_and_unbiased_projections_stay_apart() -> None:
    module = Projections((True, False), lambda a, b: (a.exp(), b.exp()))
    packed = rewritten(module, pack_linears)
    assert calls(packed.graph).count("linear") == 2


def test_projections_of_different_inputs_stay_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.a(x) + self.b(x.exp())

    assert calls(rewritten(Two(), pack_linears).graph).count("linear") == 2


def test_a_bias_goes_where_a_kernel_takes_it() -> None:
    module = Projections((True,), lambda a: a.relu())
    graph = rewritten(module, free_biases).graph
    assert calls(graph) == ["linear", "add", "relu"]


def test_a_bias_stays_where_no_kernel_follows() -> None:
    module = Projections((True,), lambda a: a)
    assert calls(rewritten(module, free_biases).graph) == ["linear"]


def test_passes_twice_change_nothing() -> None:
    module = Projections((True, True), lambda a, b: (a.relu(), b.relu()))
    once = rewritten(module, pack_linears, free_biases)
    twice = rewritten(module, pack_linears, free_biases, pack_linears, free_biases)
    assert calls(once.graph) == calls(twice.graph)


def test_addmm_and_mm_become_linear() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(5))

        def forward(self, x):
            flat = x.view(-1, x.size(-1))
            return torch.addmm(self.bias, flat, self.weight).view(*x.shape[:-1], 5)

    module = Conv1D()
    lifted = rewritten(module, use_linear, lift_views)
    assert calls(lifted.graph) == ["permute", "linear"]
    torch.testing.assert_close(run(lifted, X)[0], module(X))


def test_a_matmul_by_a_weight_becomes_linear() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scores = nn.Parameter(torch.randn(5, 8)), nn.Parameter(X.clone())

        def forward(self, x):
            return x @ self.weight.T, x @ self.scores.transpose(1, 2)

    module = Plain()
    found = rewritten(module, use_linear)
    assert [c for c in calls(found.graph) if c != "permute"] == ["linear", "matmul"]
    for ours, wanted in zip(run(found, X), module(X), strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: x[..., None] @ x[:, :, None], ["unsqueeze", "mul"]),
        (lambda x: x[0, :1].mT.mm(x[1, :1]), ["mul"]),
        (lambda x: x.transpose(1, 2) @ x, ["permute", "matmul"]),
        (lambda x: x[:, :, :1].transpose(1, 2) @ x[:, :, :1], ["matmul"]),
        (lambda x: x[0, 0, :1] @ x[0, :1], ["matmul"]),  # a vector's result has one dim less
    ],
)
def test_sums_of_one_term_are_multiplications(function, left) -> None:
    graph = captured_graph(function, X)
    use_multiplication(graph)
    assert calls(graph)[-len(left) :] == left
    before = str(graph)
    use_multiplication(graph)
    assert str(graph) == before


def test_angles_of_rotary_embeddings_are_part_of_a_run() -> None:
    def angles(frequencies: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(x.shape[1])[None, None, :].expand(x.shape[0], 1, -1).float()
        return (frequencies[None, :, None].expand(x.shape[0], -1, 1) @ steps).mT.cos() * x

    frequencies = torch.rand(8)
    fast = turbotx.optimize(angles)
    torch.testing.assert_close(fast(frequencies, X), angles(frequencies, X))
    (compiled,) = engine_of(fast).variants()
    assert [x.kind for x in compiled.assembly.launches] == ["kernel"]


class Einsums(nn.Module):
    """Two projections to heads, whose weights keep the heads apart."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Parameter(torch.randn(8, 2, 5)) for _ in range(2))

    def forward(self, x):
        return [torch.einsum("ibh,hnd->ibnd", x, w).exp() for w in (self.q, self.k)]


def test_einsum_by_weights_is_linear() -> None:
    module = Einsums()
    found = rewritten(module, use_linear, pack_linears)
    assert calls(found.graph).count("linear") == 2 and "bmm" not in calls(found.graph)
    for ours, theirs in zip(run(found, X), module(X), strict=True):
        torch.testing.assert_close(ours, theirs)


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Parameter(torch.randn(8, 4)) for _ in range(2))

    def forward(self, x):
        return (x @ self.q).exp(), (x @ self.k.view(8, 4)).exp()


def test_products_by_views_of_weights_are_packed() -> None:
    module = Products()
    found = rewritten(module, use_linear, pack_linears)
    assert calls(found.graph).count("linear") == 1
    for ours, theirs in zip(run(found, X), module(X), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_product_of_two_inputs_stays_one() -> None:
    found = rewritten(Projections((True, True), lambda a, b: a.mT @ b), use_linear)
    assert "matmul" in calls(found.graph)


class Projected(nn.Module):
    """A linear of what `turn` makes of x, with something behind it that takes any order."""

    def __init__(self, turn) -> None:
        super().__init__()
        self.linear, self.turn = nn.Linear(8, 4), turn

    def forward(self, x):
        return self.linear(self.turn(x)).exp()


@pytest.mark.parametrize(
    ("turn", "fires"),
    [
        (lambda x: x.transpose(0, 1), True),
        (lambda x: x.view(2, 3, 2, 4).permute(1, 0, 2, 3).reshape(-1, 8), True),  # merges heads
        (lambda x: x.view(2, 3, 4, 2).permute(0, 1, 3, 2).reshape(2, 3, 8), False),  # within rows
        (lambda x: x.reshape(-1, 8), False),
    ],
)
def test_linears_read_rows_as_they_lie(turn, fires: bool) -> None:
    module = Projected(turn)
    before = calls(rewritten(module).graph)
    lifted = rewritten(module, lift_permutations)
    order = calls(lifted.graph)
    turned = "permute" in order and order.index("permute") > order.index("linear")
    assert turned == fires
    assert fires or order == before
    torch.testing.assert_close(turbotx.optimize(module.eval())(X), module(X))
    again = str(lifted.graph)
    lift_permutations(lifted.graph)
    assert str(lifted.graph) == again


def test_what_the_caller_gets_stays_dense() -> None:
    module = nn.Sequential(nn.Flatten(0, 1), nn.Linear(8, 4))
    module.forward = lambda x: module[1](x.transpose(0, 1))  # type: ignore[method-assign]
    graph = rewritten(module, lift_permutations).graph
    assert calls(graph) == ["permute", "linear"]
