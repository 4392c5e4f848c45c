"""Decompose: node by node gives what a second trace gives; what needs that trace says so."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.export import Dim

import turbotx
from turbotx.capture.decompose import NotNodeByNode, decompose_nodes, table_without
from turbotx.capture.trace import KEPT_WHOLE, capture


class Mixed(nn.Module):
    """Composite ops of one result and of several, identities, sizes that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 24), nn.LayerNorm(8)

    def forward(self, x):
        a, b, c = self.linear(self.norm(x)).chunk(3, -1)
        heads = a.reshape(x.shape[0], x.shape[1], 2, 4).transpose(1, 2).contiguous()
        merged = heads.transpose(1, 2).flatten(2).to(torch.float32)
        tokens = (b * c).reshape(-1, 8)
        kept = torch.dropout(merged, 0.1, False) + x.new_ones(x.shape[1], 8)
        return kept, nn.functional.silu(tokens)


class AddsInPlace(nn.Module):
    def forward(self, x):
        y = x * 2
        y[:, 0].add_(1)
        return y


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    with torch.no_grad():
        return torch.export.export(
            model.eval(), (torch.randn(2, 5, 8),), dynamic_shapes=shapes, strict=False
        )


def ops_of(graph) -> Counter[str]:
    graph.eliminate_dead_code()
    return Counter(str(n.target) for n in graph.nodes if n.op == "call_function")


def test_the_ops_are_those_of_a_second_trace() -> None:
    program = exported(Mixed())
    whole = program.run_decompositions(table_without(KEPT_WHOLE))
    decompose_nodes(program.graph_module, KEPT_WHOLE)
    program.graph_module.graph.lint()
    assert ops_of(program.graph) == ops_of(whole.graph)
    assert "aten.linear.default" in ops_of(program.graph)


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 5, 8), (3, 7, 8)])
def test_the_graph_still_runs_at_any_size(shape) -> None:
    model = Mixed().eval()
    program = exported(model)
    decompose_nodes(program.graph_module, KEPT_WHOLE)
    program.graph_module.recompile()
    x = torch.randn(shape)
    for got, wanted in zip(program.module()(x), model(x), strict=True):
        torch.testing.assert_close(got, wanted)


class Twice(nn.Module):
    """Equal composite calls of other tensors, of one tensor twice, and of several results."""

    def forward(self, x):
        first, second, third = (self.layer(t) for t in (x, x + 1, x.transpose(0, 1)))
        return first + second, third, torch.sub(x, x, alpha=2.0), torch.sub(x, x + 1, alpha=2.0)

    def layer(self, x):
        a, b = nn.functional.silu(x).chunk(2, -1)
        return nn.functional.gelu(a).flatten(1) * b.flatten(1)


def test_an_equal_call_is_copied_with_its_own_tensors_and_values() -> None:
    model = Twice().eval()
    program = exported(model)
    whole = program.run_decompositions(table_without(KEPT_WHOLE))
    decompose_nodes(program.graph_module, KEPT_WHOLE)
    program.graph.lint()
    assert ops_of(program.graph) == ops_of(whole.graph)
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "call_function"]
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    assert len({id(v) for v in tensors}) == len(tensors)  # nodes are found by their values
    program.graph_module.recompile()
    for x in (torch.randn(2, 5, 8), torch.randn(4, 3, 8)):
        for got, wanted in zip(program.module()(x), model(x), strict=True):
            torch.testing.assert_close(got, wanted)


def test_new_nodes_come_from_where_the_old_one_did() -> None:
    program = exported(Mixed())
    decompose_nodes(program.graph_module, KEPT_WHOLE)
    (permute, *_) = program.graph.find_nodes(
        op="call_function", target=torch.ops.aten.permute.default
    )
    assert "test_decompose.py" in permute.meta["stack_trace"]


def test_a_second_time_changes_nothing() -> None:
    program = exported(Mixed())
    decompose_nodes(program.graph_module, KEPT_WHOLE)
    before = str(program.graph)
    decompose_nodes(program.graph_module, KEPT_WHOLE)
    assert str(program.graph) == before


class AsksHowClose(nn.Module):
    """PyTorch's isclose adds conditions in place, to a tensor that it has made."""

    def forward(self, x):
        y = x * 1.001
        near = torch.isclose(x, y), torch.isclose(x, y.flip(1), rtol=0.3, atol=0.1, equal_nan=True)
        exact = torch.isclose(x.long(), y.long(), rtol=0.0, atol=0.0)
        return *near, exact, x + 1 if torch.allclose(x, y) else x - 1


@pytest.mark.parametrize("shape", [(2, 5, 8), (1, 1, 8), (3, 4, 8)])
def test_what_changes_a_tensor_of_its_own_is_decomposed(shape, monkeypatch) -> None:
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", None)
    fast, plain = turbotx.optimize(AsksHowClose().eval()), AsksHowClose()
    for factor in (1e-3, 1.0, float("nan")):
        x = torch.randn(shape) * factor
        torch.testing.assert_close(fast(x), plain(x), equal_nan=True)


def test_a_change_in_place_needs_the_whole_trace() -> None:
    with pytest.raises(NotNodeByNode, match="add_"):
        decompose_nodes(exported(AddsInPlace()).graph_module, KEPT_WHOLE)
    graph = capture(AddsInPlace(), (torch.randn(2, 5, 8),), {}).graph_module.graph
    assert ops_of(graph)["aten.add.Tensor"] == 1


class TransposesNothing(nn.Module):
    def forward(self, x):
        return x.transpose(0, 0) * 2


def test_a_view_that_changes_nothing_is_its_input() -> None:
    program = exported(TransposesNothing())
    decompose_nodes(program.graph_module, KEPT_WHOLE)
    assert ops_of(program.graph) == {"aten.mul.Tensor": 1}


def test_an_op_that_asks_for_its_sizes_in_cpp_is_decomposed() -> None:
    class Kron(nn.Module):
        def forward(self, x):
            return torch.kron(x, x[:2]) + 1

    model = Kron().eval()
    fast = turbotx.optimize(model)
    for x in (torch.randn(3, 4), torch.randn(5, 2)):
        torch.testing.assert_close(fast(x), model(x))
    assert not any("kron" in str(n.target) for n in capture(model, (x,), {}).graph.nodes)


class AsksForTypes(nn.Module):
    """Calls that a trace records though they give no tensor, and no node reads what they give."""

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float64)
        alike = torch.can_cast(torch.float16, torch.result_type(x, x.half()))
        return x.to(wide) if alike else x * 2


def test_what_nothing_reads_is_not_decomposed() -> None:
    program = exported(AsksForTypes())
    assert "aten.promote_types.default" in {str(n.target) for n in program.graph.nodes}
    decompose_nodes(program.graph_module, KEPT_WHOLE)
    kept = ops_of(program.graph)
    assert kept["aten._to_copy.default"] == 1 and "aten.promote_types.default" not in kept


@pytest.mark.parametrize("backend", ["auto", "aten"])
def test_an_op_that_pytorch_decomposes_to_other_values_is_kept(backend: str) -> None:
    fast = turbotx.optimize(
        lambda x, t: nn.functional.multilabel_margin_loss(x, t), backend=backend
    )
    for n in (4, 1):
        x, classes = torch.randn(n, 5), torch.tensor([[1, 2, -1, 0, 0]]).expand(n, 5)
        wanted = nn.functional.multilabel_margin_loss(x, classes)
        torch.testing.assert_close(fast(x, classes), wanted)
