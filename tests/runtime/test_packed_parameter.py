"""Weights held in packed form only: they are read as before, and changes of them are refused."""

from __future__ import annotations

import copy
import gc
import io
import logging
import weakref

import pytest
import torch
from torch import nn

import turbotx
from turbotx.errors import OptionsError, WeightsReleasedError
from turbotx.runtime.packed_parameter import PackedParameter
from turbotx.runtime.packed_weight import PackedWeight

X = torch.randn(4, 8)


class Projections(nn.Module):
    """Products of one input, which are packed as one, one that is turned, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.turned = nn.Embedding(5, 8), nn.Parameter(torch.randn(8, 6))
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, scale=None):
        x = x + self.table.weight[0]
        out = self.a(x).tanh() * self.b(x).tanh() @ self.turned
        return out if scale is None else out * scale


def make() -> tuple[Projections, Projections, object]:
    model = Projections().eval()
    fast = turbotx.optimize(model, keep_weights=False)
    return model, copy.deepcopy(model), fast


def packed_names(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if isinstance(p, PackedParameter)}


def test_what_is_packed_is_given_back() -> None:
    model, plain, fast = make()
    memory = weakref.ref(model.a.weight.untyped_storage())
    left = weakref.ref(model.a.weight)
    for _ in range(2):
        torch.testing.assert_close(fast(X), plain(X))
    gc.collect()
    assert left() is None and memory() is None
    assert packed_names(model) == {"a.weight", "b.weight", "turned"}  # the table is read as it is
    assert fast.stats()["captures"] == 1


class Stack(nn.Module):
    """Runs a slice of its layers, a new list in each call, as transformers' decoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.count = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), 2

    def forward(self, x):
        for layer in self.layers[: self.count]:
            x = layer(x).tanh()
        return x


def test_layers_of_a_list_that_is_sliced_are_given_back() -> None:
    model = Stack().eval()
    plain, fast = copy.deepcopy(model), turbotx.optimize(model, keep_weights=False)
    left = weakref.ref(model.layers[1].weight)
    torch.testing.assert_close(fast(X), plain(X))
    assert left() is None
    assert packed_names(model) == {"layers.0.weight", "layers.1.weight"}
    model.count = plain.count = 3
    torch.testing.assert_close(fast(X), plain(X))


def test_a_state_dict_has_every_element() -> None:
    model, plain, fast = make()
    fast(X)
    for state in (model.state_dict(), fast.state_dict()):
        assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())
        assert {type(v) for v in state.values()} == {torch.Tensor}
    assert torch.equal(copy.deepcopy(model)(X), plain(X))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(X), plain(X))
    assert torch.equal(model(X), plain(X))  # PyTorch unpacks for each op


def test_another_kind_of_call_shares_what_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain, fast = make()
    fast(X)
    monkeypatch.setattr(PackedWeight, "of", lambda *args: pytest.fail("packed again"))
    scale = torch.randn(6)
    torch.testing.assert_close(fast(X, scale), plain(X, scale))
    torch.testing.assert_close(fast(X), plain(X))
    assert fast.stats()["captures"] == 2 and len(packed_names(model)) == 3


CHANGES = {
    "in place": lambda m: m.a.weight.add_(1),
    "data": lambda m: m.a.weight.data.zero_(),
    "set data": lambda m: setattr(m.a.weight, "data", torch.zeros(8, 8)),
    "a view": lambda m: m.a.weight.t().mul_(2),
    "a view of a view": lambda m: m.a.weight.view(-1)[:3].fill_(1),
    "an entry": lambda m: m.turned.__setitem__(0, 1.0),
    "detached": lambda m: m.a.weight.detach().zero_(),
    "initialized": lambda m: nn.init.zeros_(m.b.weight),
    "memory": lambda m: m.a.weight.data_ptr(),
    "shared": lambda m: m.a.weight.share_memory_(),
}


@pytest.fixture(scope="module")
def released():
    """One for all changes, none of which changes it."""
    model, plain, fast = make()
    fast(X)
    return model, plain, fast


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_refused(change, released) -> None:
    model, plain, fast = released
    with torch.no_grad(), pytest.raises(WeightsReleasedError, match=r"of '(\w\.weight|turned)'"):
        change(model)
    torch.testing.assert_close(fast(X), plain(X))


def test_a_conversion_is_refused_before_anything_is_converted() -> None:
    model, plain, fast = make()
    fast(X)
    with pytest.raises(WeightsReleasedError, match="cannot convert"):
        fast.half()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    fast.to("cpu")
    torch.testing.assert_close(fast(X), plain(X))


def test_loading_a_state_dict_is_refused() -> None:
    model, plain, fast = make()
    fast(X)
    with pytest.raises(RuntimeError, match="held in packed form only"):
        model.load_state_dict(plain.state_dict())


def test_a_parameter_may_be_replaced() -> None:
    model, plain, fast = make()
    fast(X)
    for one in (model, plain):
        one.b.weight = nn.Parameter(torch.ones(8, 8))
    torch.testing.assert_close(fast(X), plain(X))
    assert len(packed_names(model)) == 3


@pytest.mark.parametrize("hold", [lambda p: p, lambda p: p.detach(), lambda p: p.data])
def test_what_something_else_holds_stays(hold, caplog: pytest.LogCaptureFixture) -> None:
    model, plain, fast = make()
    held = hold(model.a.weight)
    with caplog.at_level(logging.WARNING, "turbotx.memory"):
        fast(X)
    assert "which something else holds too: a.weight" in caplog.text
    assert packed_names(model) == {"b.weight", "turned"}
    with torch.no_grad():
        held.add_(1)
        plain.a.weight.add_(1)
    torch.testing.assert_close(fast(X), plain(X))


def test_a_tied_table_stays_as_it_is() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 8), nn.Linear(8, 5, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    model, ids = Tied().eval(), torch.tensor([[1, 2, 3]])
    expected = model(ids)
    torch.testing.assert_close(turbotx.optimize(model, keep_weights=False)(ids), expected)
    assert not packed_names(model) and model.head.weight is model.table.weight


def test_a_report_tells_what_is_held() -> None:
    model, _, fast = make()
    fast(X)
    memory = turbotx.explain(fast, X).memory
    tables = sum(p.nbytes for n, p in model.named_parameters() if n not in packed_names(model))
    assert memory.weights_nbytes == tables
    assert memory.packed_nbytes == (8 * 16 + 6 * 8) * 4


@pytest.mark.parametrize("other", [{"pack_weights": False}, {"backend": "aten"}])
def test_options_that_pack_nothing_are_refused(other) -> None:
    with pytest.raises(OptionsError, match="keep_weights=False keeps packed weights alone"):
        turbotx.optimize(Projections().eval(), keep_weights=False, **other)
