"""nn.LSTM, nn.GRU and nn.RNN: one op, one capture for every size, weights read at every call."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import turbotx
from tests.capture.test_tracing import together

LAYERS = {
    "lstm": lambda: nn.LSTM(6, 5),
    "gru, batch first": lambda: nn.GRU(6, 5, batch_first=True),
    "rnn": lambda: nn.RNN(6, 5),
    "rnn of relu, both ways": lambda: nn.RNN(6, 5, 2, nonlinearity="relu", bidirectional=True),
    "two layers, both ways": lambda: nn.LSTM(6, 5, 2, bidirectional=True, batch_first=True),
    "projected": lambda: nn.LSTM(6, 5, proj_size=3),
    "without biases": lambda: nn.GRU(6, 5, bias=False),
}


def strides(tensor: torch.Tensor) -> list[int]:
    return [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1]


def same(fast, layer, *args) -> None:
    with torch.no_grad():
        mine, own = (torch.utils._pytree.tree_leaves(f(*args)) for f in (fast, layer))
    assert [strides(x) for x in mine] == [strides(x) for x in own]
    torch.testing.assert_close(mine, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", ["auto", "aten"])
def test_one_capture_for_every_size(name: str, backend: str) -> None:
    layer = LAYERS[name]().eval()
    kept, fast = list(layer._flat_weights), turbotx.optimize(layer, backend=backend)
    for size in ((3, 4, 6), (7, 2, 6), (2, 9, 6), (1, 4, 6), (4, 1, 6), (1, 1, 6), (30, 3, 6)):
        same(fast, layer, torch.randn(size))
    for _ in range(3):  # alone, too: eager mode, run between, repairs what a call leaves
        fast(torch.randn(5, 3, 6))
    assert fast.stats()["captures"] == 1
    assert all(a is b for a, b in zip(layer._flat_weights, kept, strict=True))
    assert not layer._weights_have_changed()


def test_empty_batches_and_no_steps_are_as_in_eager_mode() -> None:
    layer = nn.GRU(6, 5).eval()
    fast = turbotx.optimize(layer)
    fast(torch.randn(3, 4, 6))
    for size in ((3, 0, 6), (0, 3, 6)):
        x = torch.randn(size)
        try:
            own = layer(x)
        except RuntimeError:
            with pytest.raises((RuntimeError, turbotx.TurbotxError)):
                fast(x)
        else:
            torch.testing.assert_close(fast(x), own)


def test_states_that_are_given_and_sequences_without_a_batch() -> None:
    layer = nn.LSTM(6, 5).eval()
    fast = turbotx.optimize(layer)
    for batch in (3, 1, 4):
        states = (torch.randn(1, batch, 5), torch.randn(1, batch, 5))
        same(fast, layer, torch.randn(2, batch, 6), states)
    same(fast, layer, torch.randn(4, 6))
    same(fast, layer, torch.randn(9, 6))
    assert fast.stats()["captures"] == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    layer = nn.LSTM(6, 5, batch_first=True).eval()
    fast = turbotx.optimize(layer)
    fast(torch.randn(2, 3, 6))
    layer.to(dtype)
    for size in ((2, 3, 6), (1, 5, 6)):
        same(fast, layer, torch.randn(size).to(dtype))
    assert fast.stats()["captures"] == 2


def test_under_autocast_a_layer_computes_as_eager_does() -> None:
    layer = nn.Sequential(nn.GRU(6, 5)).eval()
    fast = turbotx.optimize(layer)
    for steps in (3, 2):
        x = torch.randn(steps, 4, 6)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            mine, own = fast(x), layer(x)
        assert [t.dtype for t in mine] == [t.dtype for t in own]
        torch.testing.assert_close(mine, own, rtol=2e-2, atol=2e-2)
        same(fast, layer, x)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 6), nn.Linear(10, 3)
        self.steps = nn.LSTM(6, 5, bidirectional=True, batch_first=True)

    def forward(self, ids):
        return self.out(torch.relu(self.steps(self.embed(ids))[0]))


def test_weights_are_those_of_the_call() -> None:
    model = Tagger().eval()
    fast, ids = turbotx.optimize(model), torch.randint(20, (2, 7))
    same(fast, model, ids)
    with torch.no_grad():
        model.steps.weight_hh_l0.mul_(2)
        same(fast, model, ids)
        model.steps.bias_ih_l0.data.fill_(0.5)
        same(fast, model, ids)
    model.load_state_dict(Tagger().state_dict())
    same(fast, model, ids)
    model.steps.flatten_parameters()
    same(fast, model, ids)
    assert fast.stats()["captures"] == 1
    model.steps.weight_ih_l0 = nn.Parameter(torch.randn(20, 6))
    fast(ids)
    same(fast, model, ids)
    model.steps.weight_ih_l0.data = torch.randn(6, 20).t()  # other strides
    same(fast, model, ids)
    assign = {k: v + 1 for k, v in model.state_dict().items()}
    model.load_state_dict(assign, assign=True)
    same(fast, model, ids)
    model.float()  # nothing moves, but PyTorch makes its references anew
    same(fast, model, ids)
    made = fast.stats()["captures"]
    for _ in range(3):
        same(fast, model, ids)
    assert fast.stats()["captures"] == made
    with torch.no_grad():
        model.steps.weight_hh_l0_reverse.zero_()
    same(fast, model, ids)


def test_a_layer_of_a_constant_is_computed() -> None:
    layer, rows = nn.GRU(4, 3).eval(), torch.randn(5, 1, 4)
    fast = turbotx.optimize(lambda x: x + layer(rows)[0][-1])
    x = torch.randn(2, 3)
    same(fast, lambda x: x + layer(rows)[0][-1], x)


def test_threads() -> None:
    models = [Tagger().eval() for _ in range(3)]
    fasts = [turbotx.optimize(model) for model in models]

    def run(k: int) -> None:
        for length in (3, 8, 1, 5):
            same(fasts[k % 3], models[k % 3], torch.randint(20, (2, length)))

    together(*(partial(run, k) for k in range(6)))


def test_saved_files_and_reports(tmp_path: Path) -> None:
    model, ids = Tagger().eval(), torch.randint(20, (2, 7))
    report = turbotx.explain(model, ids)
    assert report.numerics(model, ids).holds
    assert "aten.lstm.input is a recurrent layer" in str(report)
    fast = turbotx.optimize(model)
    with torch.no_grad():
        fast(ids)
        turbotx.save(fast, tmp_path / "tagger.ttx")
    loaded = turbotx.load(tmp_path / "tagger.ttx")
    for size in ((2, 7), (1, 1), (3, 12)):
        same(loaded, model, torch.randint(20, size))


def test_layers_that_keep_lists_of_parameters_go_by_what_lies_there() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
            self.held = [self.scale, self.shift]

        def forward(self, x):
            self.held = [self.scale, self.shift]
            return x * self.held[0] + self.held[1]

    model = Kept()
    fast, x = turbotx.optimize(model.eval()), torch.randn(2, 3)
    for _ in range(3):
        fast(x)
    assert fast.stats()["captures"] == 1
    model.held = []
    same(fast, model, x)
    model.held = []
    fast(x)
    assert len(model.held) == 2 and model.held[0] is model.scale
    model.scale = nn.Parameter(torch.full((3,), 2.0))
    fast(x)
    assert model.held[0] is model.scale
    same(fast, model, x)
