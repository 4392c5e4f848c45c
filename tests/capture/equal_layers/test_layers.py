"""A layer that is equal to two before it is copied, to the same graph; one that differs is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import turbotx
from turbotx.capture.equal_layers import layers as equal_layers
from turbotx.capture.equal_layers.layers import LayerCalls
from turbotx.engine.optimize import engine_of

LAYERS = 6
_OF_STAND_INS = (".reset_proxy_mapping", ".get_base")
SEEN: list[Any] = []
COUNTS = {"calls": 0}


class Part(nn.Module):
    """Half of a layer: what lies deeper has to be looked at too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.scale, self.times = 0.5, torch.float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return linear(norm(x)) times scale."""
        return self.linear(self.norm(x)).to(self.times).float() * self.scale


class Layer(nn.Module):
    """A layer with attributes of all kinds."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.part, self.act, self.index = Part(), nn.GELU(), index
        self.swaps, self.window = False, 4
        self.odd: Any = None

    def forward(self, x: torch.Tensor, mask: torch.Tensor, place: Any = None) -> torch.Tensor:
        """Return x and what the part makes of it, where the mask says so."""
        y = self.act(self.part(x))
        if self.swaps:
            y = y.flip(-1)
        if place is not None:
            y = y * place
        if self.odd is not None:
            y = self.odd(self, y)
        return x + torch.where(mask[:, : self.window].any(1)[:, None, None], y, -y)


class Stack(nn.Module):
    """Equal layers, until a test changes one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(k) for k in range(LAYERS))
        self.tells = False

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the last layer's result."""
        for k, layer in enumerate(self.layers):
            x = layer(x, mask, float(k) if self.tells else None)
        return x


def make_stack() -> Any:
    torch.manual_seed(0)
    return Stack().eval()


def call() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 5, 8), "mask": torch.rand(2, 5) > 0.5}


def trace(model: nn.Module, given: dict[str, torch.Tensor]) -> tuple[str, LayerCalls]:
    """Return a capture as text, all that passes and guards read of it, and what was copied."""
    captured = engine_of(turbotx.optimize(model)).capture((), given)
    assert captured.state is not None
    keys = ("val", "stack_trace", "nn_module_stack")
    nodes = [(n.format_node(), *(str(n.meta.get(k)) for k in keys)) for n in captured.graph.nodes]
    # PyTorch's stand-ins for modules that a model has twice ask for methods of their own.
    places = [p.text for p in captured.state.places if not p.text.endswith(_OF_STAND_INS)]
    return str((nodes, places, captured.guards, captured.dims)), captured.layers


def trace_both(
    model: nn.Module, given: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> LayerCalls:
    """Trace with and without copies; the graphs must be the same."""
    text, calls = trace(model, given)
    with monkeypatch.context() as patched:
        patched.setattr(equal_layers, "_find_layers", lambda model: iter(()))
        plain, none = trace(model, given)
    assert text == plain
    assert not none.copied
    return calls


def test_equal_layers_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = make_stack(), call()
    calls = trace_both(model, given, monkeypatch)
    assert calls.traced == ["layers.0", "layers.1", "layers.2"]  # the first one sets a guard
    assert calls.copied == [f"layers.{k}" for k in range(3, LAYERS)]
    assert list(calls.reasons) == ["layers.1"]
    torch.testing.assert_close(turbotx.optimize(model, backend="aten")(**given), model(**given))
    assert (
        turbotx.explain(turbotx.optimize(model, backend="aten"), **given).layers.copied
        == calls.copied
    )


def test_a_copied_layer_is_guarded_as_a_traced_one() -> None:
    model, given = make_stack(), call()
    fast = turbotx.optimize(model, backend="aten")
    fast(**given)
    model.layers[4].part.scale = 3.0
    torch.testing.assert_close(fast(**given), model(**given))
    with torch.no_grad():
        model.layers[5].part.linear.weight.mul_(2)
    torch.testing.assert_close(fast(**given), model(**given))


def _set(path: str, value: Any) -> Callable[[Any], None]:
    """Return a change of layer 4: an attribute of it."""

    def change(model: Any) -> None:
        owner, _, name = f"layers.4.{path}".rpartition(".")
        setattr(model.get_submodule(owner), name, value)

    return change


def _tie(model: Any) -> None:
    model.layers[4].part.norm.bias = model.layers[4].part.norm.weight


def _to_double(model: Any) -> None:
    model.layers[4].part.norm.weight = nn.Parameter(torch.ones(8, dtype=torch.float64))
    model.layers[4].part.norm.bias = None
    model.layers[4].part.norm.double()
    model.layers[4].part.linear.double()


def _hook(model: Any) -> None:
    model.layers[4].act.register_forward_hook(lambda module, args, output: output * 2)


def _wrap(model: Any) -> None:
    layer = model.layers[4]
    layer.forward = lambda *args: type(layer).forward(layer, *args) + 1


DIFFERENCES: dict[str, Callable[[Any], None]] = {
    "flag": _set("swaps", True),
    "scalar": _set("part.scale", 0.25),
    "signed zero": _set("part.scale", -0.0),
    "eps": _set("part.norm.eps", 1e-3),
    "dtype attribute": _set("part.times", torch.bfloat16),
    "window": _set("window", 2),
    "class of a part": _set("act", nn.SiLU()),
    "no bias": _set("part.linear.bias", None),
    "strides": _set("part.linear.weight", nn.Parameter(torch.randn(8, 8).t())),
    "tied inside": _tie,
    "dtype of weights": _to_double,
    "hook": _hook,
    "forward of its own": _wrap,
    "a float for an int": _set("window", 4.0),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_layer_that_differs_is_traced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = make_stack(), call()
    if name == "signed zero":
        for layer in model.layers:
            layer.part.scale = 0.0
    DIFFERENCES[name](model)
    if name in ("a float for an int", "dtype of weights"):
        with pytest.raises((TypeError, RuntimeError)):
            model(**given)
        return
    calls = trace_both(model, given, monkeypatch)
    assert calls.traced == ["layers.0", "layers.1", "layers.2", "layers.4"]
    assert calls.copied == ["layers.3", "layers.5"]
    assert "layers.4" in calls.reasons


def test_the_tie_of_two_layers_does_not_change_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = make_stack(), call()
    model.layers[4].part.linear.weight = model.layers[2].part.linear.weight
    assert "layers.5" in trace_both(model, given, monkeypatch).copied


def test_a_layer_that_is_told_its_place_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = make_stack(), call()
    model.tells = True
    calls = trace_both(model, given, monkeypatch)
    assert not calls.copied
    assert calls.reasons["layers.3"] == "its arguments are of another kind"


def test_layers_that_read_their_index_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = make_stack(), call()
    for layer in model.layers:
        layer.odd = _by_index
    calls = trace_both(model, given, monkeypatch)
    assert not calls.copied
    assert calls.reasons["layers.3"] == "index differs"


def _by_index(layer: Any, y: torch.Tensor) -> torch.Tensor:
    return y * layer.index


def test_alternating_layers_are_copied_of_their_own_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = make_stack(), call()
    for layer in list(model.layers)[1::2]:
        layer.swaps = True
    model.layers.append(model.layers[3])  # one layer twice
    calls = trace_both(model, given, monkeypatch)
    assert calls.copied == ["layers.5", "layers.6"]


def _keep(layer: Any, y: torch.Tensor) -> torch.Tensor:
    layer.kept = y
    return y


def _count(layer: Any, y: torch.Tensor) -> torch.Tensor:
    COUNTS["calls"] += 1
    return y


def _collect(layer: Any, y: torch.Tensor) -> torch.Tensor:
    SEEN.append(y)
    return y


def _draw(layer: Any, y: torch.Tensor) -> torch.Tensor:
    return y + torch.rand_like(y)


def _constant(layer: Any, y: torch.Tensor) -> torch.Tensor:
    return y + torch.tensor([0.5, 1.0]).sum()


def _decide(layer: Any, y: torch.Tensor) -> torch.Tensor:
    return y if bool(y.isfinite().all()) else y.nan_to_num()


LEAVES: dict[str, Callable[..., torch.Tensor]] = {
    "attribute": _keep, "global list": _collect, "random": _draw, "constant": _constant,
    "decision": _decide,
}  # fmt: skip


@pytest.mark.parametrize("name", LEAVES)
def test_layers_that_do_more_than_compute_are_traced(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = make_stack(), call()
    for layer in model.layers:
        layer.odd = LEAVES[name]
    calls = trace_both(model, given, monkeypatch)
    assert not calls.copied, name
    assert calls.reasons


def _ask(layer: Any, y: torch.Tensor) -> torch.Tensor:
    return y * 2 if layer.part.linear.weight.requires_grad else y


def test_layers_that_ask_for_gradients_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = make_stack(), call()
    for layer in model.layers:
        layer.odd = _ask
    model.layers[4].requires_grad_(False)
    assert not trace_both(model, given, monkeypatch).copied
    fast = turbotx.optimize(model, backend="aten")
    for frozen in (4, 5, 2):  # noticed of every layer
        model.layers[frozen].requires_grad_(False)
        torch.testing.assert_close(fast(**given), model(**given))


def test_a_counter_around_layers_is_told() -> None:
    model, given = make_stack(), call()
    for layer in model.layers:
        layer.odd = _count
    with pytest.raises(turbotx.TurbotxError, match="calls"):
        engine_of(turbotx.optimize(model)).capture((), given)


class Writing(Stack):
    """Layers that change what they are given."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return x, which every layer has added to."""
        x = x + 0
        for layer in self.layers:
            x.add_(layer(x, mask))
        return x


def test_tensors_that_are_written_between_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, given = Writing().eval(), call()
    trace_both(model, given, monkeypatch)
    torch.testing.assert_close(turbotx.optimize(model, backend="aten")(**given), model(**given))


class Skipping(Stack):
    """Layers whose earlier results are used again, after a layer has asked for them as floats."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the last result plus an older one."""
        results = [x]
        for layer in self.layers:
            results.append(
                layer(results[-1].float(), mask) + 0.1 * results[max(0, len(results) - 3)]
            )
        return results[-1] + results[2]


def test_results_that_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, given = Skipping().eval(), call()
    calls = trace_both(model, given, monkeypatch)
    assert calls.copied
    torch.testing.assert_close(turbotx.optimize(model, backend="aten")(**given), model(**given))


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    SEEN.clear()
    COUNTS["calls"] = 0
