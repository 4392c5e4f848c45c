"""Weights: what derives from parameters is made again when they change, and only then."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import turbotx
from turbotx.engine.optimize import engine_of
from turbotx.errors import CaptureError
from turbotx.runtime import weights as weights_module

X = torch.randn(4, 8)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.a(x).tanh() + self.b(x).tanh()


def weights_of(fast):
    (compiled,) = engine_of(fast).variants()
    return compiled.program.runtime.weights


def test_unchanged_parameters_are_looked_at_only() -> None:
    fast = turbotx.optimize(Packed().eval())
    fast(X)
    before = weights_of(fast).version
    fast(X)
    assert weights_of(fast).version == before
    assert weights_of(fast).refresh() is False


def test_a_change_of_one_piece_repacks_the_whole() -> None:
    model = Packed().eval()
    fast = turbotx.optimize(model)
    fast(X)
    before = weights_of(fast).version
    with torch.no_grad():
        model.b.weight.add_(1)
    torch.testing.assert_close(fast(X), model(X))
    assert weights_of(fast).version == before + 1


def test_a_call_beside_one_that_derives_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Packed().eval()
    fast = turbotx.optimize(model)
    fast(X)
    weights = weights_of(fast)
    before, compute, entered, go = (
        weights.version, weights_module.compute_constant, threading.Event(), threading.Event()
    )  # fmt: skip

    def compute_slowly(node, tensors):
        entered.set()
        assert go.wait(60)
        return compute(node, tensors)

    monkeypatch.setattr(weights_module, "compute_constant", compute_slowly)
    with torch.no_grad():
        model.b.weight.add_(1)
    seen: list[int] = []
    calls = [
        threading.Thread(target=lambda: (weights.refresh(), seen.append(weights.version)))
        for _ in range(2)
    ]
    calls[0].start()
    assert entered.wait(60)
    calls[1].start()
    calls[1].join(0.2)
    assert not seen  # neither went on with the packed weights of before
    go.set()
    for call in calls:
        call.join()
    assert seen == [before + 1] * 2


class Parts(nn.Module):
    """Queries by the first rows of a weight, keys and values by the rest, as in PyTorch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(24))

    def forward(self, x, memory):
        (first, rest), (b, c) = self.weight.split([8, 16]), self.bias.split([8, 16])
        return nn.functional.linear(x, first, b), nn.functional.linear(memory, rest, c)


def test_products_read_parts_of_one_weight() -> None:
    model = Parts().eval()
    fast, memory = turbotx.optimize(model), torch.randn(3, 8)
    for ours, theirs in zip(fast(X, memory), model(X, memory), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_weights_are_packed_from_their_parts() -> None:
    fast = turbotx.optimize(Packed().eval())
    fast(X)
    weights = weights_of(fast)
    made = {
        n: weights.tensors.get(n)
        for n in weights.hoisted
        if weights.hoisted[n].meta["val"].dim() == 2
    }
    assert made and set(made.values()) == {None}  # no concatenation is kept
    ((packing,),) = [engine_of(fast).variants()[0].program.runtime.packings]
    assert len(packing.parts) == 2


def test_prepared_constants_are_not_the_users_tensors() -> None:
    model = Packed().eval()
    fast = turbotx.optimize(model)
    fast(X)
    own = {p.data_ptr() for p in model.parameters()}
    tensors = weights_of(fast).tensors
    hoisted = [tensors[name] for name in weights_of(fast).hoisted]
    assert hoisted
    assert not own & {t.data_ptr() for t in hoisted}


def test_half_precision_weights() -> None:
    model = Packed().to(torch.bfloat16).eval()
    x = X.to(torch.bfloat16)
    torch.testing.assert_close(turbotx.optimize(model)(x), model(x), rtol=2e-2, atol=2e-2)


def run(change, model, call=X, captures: int = 1) -> None:
    """Change a model after a call; the next one is the changed model's."""
    fast = turbotx.optimize(model.eval())
    fast(call)
    with torch.no_grad():
        change(model)
    expected = model(call)
    torch.testing.assert_close(fast(call), expected, rtol=1e-2, atol=1e-2)
    assert fast(call).dtype == expected.dtype
    assert fast.stats()["captures"] == captures


CONVERTED = {
    "double": lambda m: m.double(),
    "a part": lambda m: (m[0].bfloat16(), m[2].bfloat16()),
    "there and back": lambda m: m.bfloat16().float(),
    "turned": lambda m: setattr(m[1].weight, "data", m[1].weight.data.t()),
    "turned by set_": lambda m: m[1].weight.set_(torch.rand(6, 6).t()),
    "wider inside": lambda m: (
        setattr(m[1], "weight", nn.Parameter(torch.rand(9, 6))),
        setattr(m[1], "bias", nn.Parameter(torch.rand(9))),
        setattr(m[2], "weight", nn.Parameter(torch.rand(5, 9))),
    ),
    "no bias": lambda m: setattr(m[2], "bias", None),
    "average": lambda m: [p.data.mul_(0.99).add_(0.01) for p in m.parameters()],
    "clamp": lambda m: m[1].weight.data.clamp_(-0.01, 0.01),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_parameters_that_became_others(name: str) -> None:
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 5))
    if name == "a part":
        model[1] = nn.Flatten()
        model[2] = nn.Linear(18, 5)
    # A capture that no longer fits is forgotten; one of another state of the modules is kept.
    captures = 2 if name in ("wider inside", "no bias") else 1
    run(CONVERTED[name], model, torch.tensor([[1, 2, 6], [0, 3, 5]]), captures)


def test_what_is_derived_is_made_again_after_data_was_written() -> None:
    run(lambda m: m.b.weight.data.normal_(), Packed())  # packed from two parameters


def test_a_closures_parameters_are_watched_themselves() -> None:
    linear = nn.Linear(8, 3).requires_grad_(False)
    fast = turbotx.optimize(lambda x: linear(x) + 1)
    fast(X)
    linear.weight.data = torch.randn(3, 8)
    torch.testing.assert_close(fast(X), linear(X) + 1)
    linear.weight.data = torch.randn(8, 3).t()
    torch.testing.assert_close(fast(X), linear(X) + 1)
    linear.double()
    torch.testing.assert_close(fast(X.double()), linear(X.double()) + 1)


def test_refresh_sees_what_no_look_does() -> None:
    model = nn.Linear(64, 64).eval()
    fast, x = turbotx.optimize(model), torch.randn(4, 64)
    fast(x)
    model.weight.data[31, 17] += 100
    fast.refresh()
    torch.testing.assert_close(fast(x), model(x))


def test_values_alone_are_no_reason_to_capture() -> None:
    model = Packed().eval()
    fast = turbotx.optimize(model)
    fast(X)
    (before,) = engine_of(fast).variants()
    model.a.weight.data = torch.randn(8, 8)
    fast(X)
    assert engine_of(fast).variants() == [before]


def test_threads_meet_a_converted_model_with_one_capture() -> None:
    model = Packed().eval()
    fast = turbotx.optimize(model)
    fast(X)
    model.double()
    made = []
    engine = engine_of(fast)
    make, engine.make = engine.make, lambda *call: made.append(call) or make(*call)
    found: list[torch.Tensor] = []
    calls = [threading.Thread(target=lambda: found.append(fast(X.double()))) for _ in range(3)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert len(found) == 3 and len(made) == 1
    for one in found:
        torch.testing.assert_close(one, model(X.double()))


def test_a_tensor_without_a_version_is_refused_also_after_its_data_was_replaced() -> None:
    layer = nn.Linear(3, 3).eval()
    fast, x = turbotx.optimize(layer), torch.ones(3)
    fast(x)
    with torch.inference_mode():
        weight = nn.Parameter(torch.ones(3, 3), requires_grad=False)
    weight.data = torch.ones(3, 3)
    assert not weight.is_inference()
    layer.weight = weight
    with pytest.raises(CaptureError, match=r"'weight' was made under torch\.inference_mode"):
        fast(x)
