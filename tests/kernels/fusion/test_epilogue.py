"""Epilogues: which regions go into their GEMM's launch, which do not, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import turbotx
from tests.graphs import captured
from tests.kernels.cpp.cpp_probe import needs_compiler
from turbotx.engine.optimize import engine_of
from turbotx.engine.pipeline import rewrite
from turbotx.kernels.fusion.epilogue import Epilogue, find_epilogues
from turbotx.kernels.fusion.fuse import fuse_all
from turbotx.passes.partition import find_hoisted, kind_of, partition

torch.manual_seed(0)
UP, DOWN, GATED = nn.Linear(16, 48), nn.Linear(48, 16), nn.Linear(16, 96)
W = nn.ParameterList([torch.randn(40, 16), torch.randn(40, 16)])
X = torch.randn(2, 5, 16)


def gelu_by_hand(x: torch.Tensor) -> torch.Tensor:
    inner = 0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def halves(x: torch.Tensor) -> torch.Tensor:
    gate, factor = GATED(x).chunk(2, -1)
    return F.silu(gate) * factor


def found(function: Callable[..., Any], *args: torch.Tensor) -> list[Epilogue]:
    graph = captured(function, *args).graph_module.graph
    rewrite(graph)
    hoisted = find_hoisted(graph)
    kinds = {n: kind_of(n, hoisted) for n in graph.nodes}
    return list(find_epilogues(fuse_all(graph, partition(graph, hoisted), hoisted), kinds).values())


FIRES: dict[str, tuple[Callable[..., Any], str, bool]] = {
    "gelu": (lambda x: F.gelu(UP(x)), "linear_gelu", True),
    "gelu without a bias": (lambda x: F.gelu(F.linear(x, W[0])), "linear_gelu", False),
    "gelu, tanh": (lambda x: F.gelu(UP(x), approximate="tanh"), "linear_gelu_tanh", True),
    "gelu, tanh, written out": (lambda x: gelu_by_hand(UP(x)), "linear_gelu_tanh", True),
    "relu of a 2-d input": (lambda x: F.relu(UP(x[:, 0])), "linear_relu", True),
    "silu": (lambda x: F.silu(UP(x)), "linear_silu", True),
    "tanh": (lambda x: torch.tanh(UP(x)), "linear_tanh", True),
    "residual": (lambda x: x + DOWN(F.gelu(UP(x))), "linear_add", True),
    "residual after an activation": (lambda x: F.relu(DOWN(UP(x))) + x, "linear_relu_add", True),
    "gate": (
        lambda x: F.silu(F.linear(x, W[0])) * F.linear(x, W[1]),
        "linear_silu_mul",
        False,
    ),
    "gate, one linear": (halves, "linear_silu_mul", True),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str) -> None:
    function, launch, biased = FIRES[name]
    last = found(function, X)[-1]
    assert last.name == launch and (last.bias is not None) == biased


STAYS: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "the sums are read elsewhere": (lambda x: (F.gelu(UP(x)), UP(x) * 2), (X,)),
    "a reduction follows": (lambda x: F.gelu(UP(x)).softmax(-1), (X,)),
    "relu of a residual sum": (lambda x: F.relu(DOWN(UP(x)) + x), (X,)),
    "a residual that is broadcast": (lambda x, y: DOWN(UP(x)) + y, (X, X[:, :1])),
    "a residual that lies transposed": (
        lambda x, y: DOWN(UP(x)) + y.transpose(1, 2),
        (X, X.transpose(1, 2).contiguous()),
    ),
    "a scaled residual": (lambda x: torch.add(DOWN(UP(x)), x, alpha=2), (X,)),
    "a bias a token": (lambda x, y: F.gelu(F.linear(x, W[0]) + y), (X, X[:, :, :1])),
    "another constant": (lambda x: 0.4 * UP(x) * (1 + torch.tanh(UP(x))), (X,)),
    "a cast": (lambda x: F.gelu(UP(x)).double(), (X,)),
    "the factor comes first": (lambda x: GATED(x)[..., :48] * GATED(x)[..., 48:].sigmoid(), (X,)),
    "no constant weight": (lambda x, w: F.gelu(F.linear(x, w)), (X, torch.randn(8, 16))),
}


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str) -> None:
    function, args = STAYS[name]
    names = [e.name for e in found(function, *args)]
    assert names in ([], ["linear"]), names


class Every(nn.Module):
    """Every kind of epilogue, biased and not, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 50), nn.Linear(50, 16, bias=False)
        self.gate, self.factor = nn.Linear(16, 45), nn.Linear(16, 45)
        self.out, self.last = nn.Linear(45, 16), nn.Linear(16, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(F.gelu(self.up(x)))
        x = F.relu(self.out(F.silu(self.gate(x)) * self.factor(x))) + x
        return torch.tanh(self.last(gelu_by_hand(x)))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results(dtype: torch.dtype) -> None:
    model = Every().to(dtype).eval()
    fast, plain = turbotx.optimize(model), turbotx.optimize(model, backend="aten")
    exact = Every().double().eval()
    exact.load_state_dict(model.state_dict())
    for shape in ((2, 5), (1, 1), (1, 37), (3, 0)):
        x = torch.randn(*shape, 16).to(dtype)
        with torch.no_grad():
            eager, true = model(x), exact(x.double())
        for ours in (fast(x), plain(x)):
            error = (ours.double() - true).abs().amax() if x.numel() else 0
            allowed = (eager.double() - true).abs().amax() if x.numel() else 0
            assert error <= 1.5 * allowed + 2 * torch.finfo(dtype).eps
    names = [x.name.rpartition("_")[0] for x in engine_of(fast).variants()[0].assembly.launches]
    assert names.count("linear_silu_mul") == names.count("linear_tanh") == 1
    assert "linear_gelu" in names and "linear_add" in names and "linear_relu_add" not in names[:1]


def test_a_residual_that_dies_is_written_over() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        return DOWN(F.gelu(UP(y.cos()))) + y + 0

    fast = turbotx.optimize(lambda x: function(x).softmax(-1), backend="aten")
    torch.testing.assert_close(fast(X), function(X).softmax(-1))


@pytest.mark.parametrize("same", [True, False])
def test_in_place_only_where_the_product_reads_something_else(same: bool) -> None:
    square, other = nn.Linear(16, 16), nn.Linear(16, 16)

    def function(x: torch.Tensor) -> torch.Tensor:
        y = other(x.sin()).reshape(-1, 16)
        z = y if same else other(x.cos()).reshape(-1, 16)
        return square(z) + y

    fast = turbotx.optimize(function, backend="aten")
    with torch.no_grad():
        torch.testing.assert_close(fast(X), function(X))
    (last,) = [x for x in engine_of(fast).variants()[0].assembly.launches if "_add" in x.name]
    assert bool(last.inplace) == (not same)
