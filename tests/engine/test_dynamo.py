"""The backend of torch.compile: graph breaks, any sizes, sizes that are inputs, and refusals said.

In: modules that turbotx.optimize could not take whole. Out: PyTorch's own results, and records of
what became of every graph.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.capture.test_tracing import together
from tests.models import small_model, token_inputs
from turbotx.engine.dynamo import compile_graph, forget_graphs, graphs
from turbotx.errors import EagerWarning, TrainingError


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield
    torch._dynamo.reset()
    gc.collect()
    forget_graphs()


class Broken(nn.Module):
    """A branch on values in the middle: two graphs, which two instances share."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        y = self.down(torch.nn.functional.gelu(self.up(x))) * self.scale
        if y.sum() > 1e9:
            y = y + 1
        return self.norm(x + y)


def compiled(target, **options):
    return torch.compile(target, backend=compile_graph, **options)


def test_the_entry_point_names_the_backend() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    section = text.partition("[project.entry-points.torch_dynamo_backends]")[2]
    name, _, place = section.strip().splitlines()[0].partition(" = ")
    module, _, attribute = place.strip('"').partition(":")
    assert name == "turbotx" and getattr(import_module(module), attribute) is compile_graph


def test_graphs_are_broken_shared_and_take_any_size() -> None:
    model = nn.Sequential(Broken(), Broken()).eval()
    fast = compiled(model, dynamic=True)
    for shape in ((2, 3), (4, 5), (7, 11), (3, 3)):
        x = torch.randn(*shape, 8)
        torch.testing.assert_close(fast(x), model(x))
    made = graphs()
    assert len(made) == 2
    assert all(g.captures == 1 and g.parameter_sets == 2 and not g.eager for g in made)
    with torch.no_grad():
        model[1].up.weight.mul_(-1)
        model[0].norm.weight = nn.Parameter(torch.randn(8))
    torch.testing.assert_close(fast(x), model(x))
    with torch.inference_mode():
        x = torch.randn(1, 5, 8)
        torch.testing.assert_close(fast(x), model(x))


def test_parameters_as_attributes_of_the_graph() -> None:
    model = Broken().eval()
    with torch._dynamo.config.patch(inline_inbuilt_nn_modules=False):
        fast = compiled(model, dynamic=True)
        for shape in ((2, 3), (4, 5)):
            x = torch.randn(*shape, 8)
            torch.testing.assert_close(fast(x), model(x))
    assert [g.captures for g in graphs()] == [1, 1]


def test_bert_in_threads_with_a_dim_marked_dynamic() -> None:
    model = small_model("bert")
    fast = compiled(model)
    first = token_inputs(2, 9)
    for tensor in first.values():
        torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(tensor, 1)
    torch.testing.assert_close(fast(**first)[0], model(**first)[0], rtol=1e-4, atol=1e-5)
    before = graphs()
    assert before and not any(g.eager for g in before)
    cases = [token_inputs(b, s) for b, s in ((3, 5), (2, 30), (4, 17))]
    expected = [model(**case)[0] for case in cases]

    def work(k: int) -> None:
        with torch.no_grad():
            for i in range(6):
                at = (i + k) % len(cases)
                found = fast(**cases[at])[0]
                torch.testing.assert_close(found, expected[at], rtol=1e-4, atol=1e-5)

    together(*(partial(work, k) for k in range(2)))
    assert graphs() == before


def test_integers_that_are_no_tensors_size() -> None:
    @torch.compile(backend=compile_graph, dynamic=True)
    def repeat(x, n):
        return x.repeat(n, 1) + n

    x = torch.randn(3, 4)
    for n in (2, 3, 5):
        torch.testing.assert_close(repeat(x, n), x.repeat(n, 1) + n)
    assert [g.captures for g in graphs()] == [1]


def test_what_cannot_be_taken_runs_in_pytorch_with_a_warning() -> None:
    @torch.compile(backend=compile_graph, dynamic=True)
    def count(x):
        x.add_(1)
        return x * 2

    x = torch.zeros(3, 4)
    with pytest.warns(EagerWarning, match="changes an input"):
        torch.testing.assert_close(count(x), torch.full((3, 4), 2.0))
    assert bool((x == 1).all())
    torch.testing.assert_close(count(x), torch.full((3, 4), 4.0))
    (found,) = graphs()
    assert "changes an input" in found.eager and found.ops == 2


def test_gradients_are_refused() -> None:
    fast = compiled(Broken().eval())
    with torch.enable_grad(), pytest.raises(TrainingError, match=r"under torch\.no_grad\(\)"):
        fast(torch.randn(2, 3, 8))


def test_options_are_those_of_optimize() -> None:
    x = torch.randn(2, 8)
    layer = nn.Linear(8, 8)
    fast = compiled(layer, options={"pack_weights": False})
    torch.testing.assert_close(fast(x), layer(x))
    with pytest.raises(Exception, match="did you mean 'planner'"):  # Dynamo wraps it
        compiled(nn.Linear(8, 8), options={"planer": "greedy"})(x)
    with pytest.raises(Exception, match="keep_weights=False gives no memory back under"):
        compiled(nn.Linear(8, 8), options={"keep_weights": False})(x)
