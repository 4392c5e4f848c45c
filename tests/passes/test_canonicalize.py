"""Canonicalization: no-ops go, duplicates merge, and a second run changes nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import turbotx
from tests.graphs import calls, captured_graph
from turbotx.passes.canonicalize import canonicalize

X = torch.randn(2, 3, 8)


def canonical(function, *args):
    graph = captured_graph(function, *args)
    canonicalize(graph)
    return graph


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: F.dropout(x, 0.5, training=False).exp(), ["exp"]),
        (lambda x: x.clone().contiguous().exp(), ["exp"]),
        (lambda x: x.to(torch.float32).exp(), ["exp"]),
        (lambda x: x.view(x.shape).exp(), ["exp"]),
        (lambda x: x.transpose(1, 2).transpose(1, 2).exp(), ["exp"]),
        (lambda x: x.permute(1, 2, 0).permute(2, 0, 1).exp(), ["exp"]),
        (lambda x: x.reshape(-1, 8).reshape(x.shape).exp(), ["exp"]),
        (lambda x: x[:, :, :].exp(), ["exp"]),
        (lambda x: (x.long() + 0).neg(), ["to_copy", "neg"]),
        (lambda x: (x - 0).exp(), ["exp"]),
        (lambda x: (x + -0.0).exp(), ["exp"]),
        (lambda x: (x * 1).exp(), ["exp"]),
        (lambda x: (x.exp(), x.sin())[0], ["exp"]),
        (lambda x: x.exp() + x.exp(), ["exp", "add"]),
        (lambda x: (x + x.exp()) * (x.exp() + x), ["exp", "add", "mul"]),
    ],
)
def test_no_ops_go(function, left) -> None:
    assert calls(canonical(function, X)) == left


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: (x + 1).exp(), ["add", "exp"]),
        (lambda x: (x + 0).reciprocal(), ["add", "reciprocal"]),
        (lambda x: (0.0 + x).exp(), ["add", "exp"]),
        (lambda x: (x - -0.0).exp(), ["sub", "exp"]),
        (lambda x: x.transpose(1, 2).exp(), ["permute", "exp"]),
        (lambda x: x.to(torch.float64).exp(), ["to_copy", "exp"]),
        (lambda x: x[:, 1:].exp(), ["slice", "exp"]),
        (lambda x: x.view(-1, 8).exp(), ["view", "exp"]),
        (lambda x: torch.add(x, 0 * x), ["mul", "add"]),
        (lambda x: (x - x.exp()) * (x.exp() - x), ["exp", "sub", "sub", "mul"]),
        (
            lambda x: torch.add(x, x.exp(), alpha=2) * torch.add(x.exp(), x, alpha=2),
            ["exp", "add", "add", "mul"],
        ),
    ],
)
def test_real_work_stays(function, left) -> None:
    assert calls(canonical(function, X)) == left


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: x.unsqueeze(1).reshape(6, 8).exp(), ["view", "exp"]),
        (lambda x: x[:, :, None].transpose(1, 2).reshape(6, 8).exp(), ["view", "exp"]),
        (
            lambda x: x[..., None].permute(0, 2, 3, 1).reshape(16, 3).exp(),
            ["permute", "view", "exp"],
        ),
    ],
)
def test_dims_of_one_are_in_nobodys_way(function, left) -> None:
    graph = canonical(function, X)
    assert [c for c in calls(graph) if c not in ("clone", "sym_size")] == left
    before = str(graph)
    canonicalize(graph)
    assert str(graph) == before
    torch.testing.assert_close(turbotx.optimize(function)(X), function(X))


def test_reshapes_of_reshapes_are_one() -> None:
    graph = canonical(lambda x: x.reshape(-1, 8).reshape(-1, 4).exp(), X)
    assert calls(graph) == ["view", "exp"]


def test_a_second_run_changes_nothing() -> None:
    def function(x):
        y = F.dropout(x.transpose(1, 2).transpose(2, 1), 0.1, training=False)
        return (y.clone() + y.clone()).softmax(-1)

    graph = canonical(function, X)
    before = str(graph)
    canonicalize(graph)
    assert str(graph) == before


def test_random_calls_are_never_merged() -> None:
    graph = canonical(lambda x: torch.rand_like(x) + torch.rand_like(x), X)
    assert calls(graph).count("add") == 1
    assert len([c for c in calls(graph) if "rand" in c]) == 2
