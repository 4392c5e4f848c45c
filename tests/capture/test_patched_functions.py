"""Functions of PyTorch's that a user has replaced by ones that call them: each runs once a call.

In: modules that call such functions, replaced before or after the first call. Out: eager mode's
results; a method of torch.Tensor is refused, by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import turbotx
from turbotx.errors import CaptureError

X = torch.randn(2, 3, 4)


def by_closure(plain: Any) -> Any:
    return lambda *args, **kwargs: 2 * plain(*args, **kwargs)


def by_wraps(plain: Any) -> Any:
    @functools.wraps(plain)
    def doubled(*args: Any, **kwargs: Any) -> Any:
        return 2 * plain(*args, **kwargs)

    return doubled


class Doubled:
    def __init__(self, plain: Any) -> None:
        self.plain = plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * self.plain(*args, **kwargs)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.soft, self.encoder = (
            nn.LayerNorm(4), nn.Softmax(-1), nn.TransformerEncoderLayer(4, 2, 8),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.soft(self.norm(x)))


@pytest.mark.parametrize("replace", [by_closure, by_wraps, Doubled])
@pytest.mark.parametrize("name", ["layer_norm", "softmax", "scaled_dot_product_attention"])
def test_a_function_runs_once(
    name: str, replace: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Layers().eval()
    fast = turbotx.optimize(model, backend="aten")
    before = fast(X)
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, name, replace(getattr(nn.functional, name)))
        for x in (X, X[:1]):
            torch.testing.assert_close(fast(x), model(x))
        assert not torch.allclose(fast(X), before)
    torch.testing.assert_close(fast(X), before)


@pytest.mark.parametrize("name", ["relu", "softmax", "split"])
def test_a_method_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = getattr(torch.Tensor, name)
    monkeypatch.setattr(torch.Tensor, name, lambda x, *args: plain(x, *args))

    def uses(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.relu(), x.softmax(-1), *x.split(1)

    with pytest.raises(CaptureError, match=rf"torch\.Tensor\.{name} is replaced by .*<lambda>"):
        turbotx.optimize(uses, backend="aten")(X)


def test_a_method_that_replaces_another_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "relu", lambda x: x * 7)
    fast = turbotx.optimize(lambda x: x.relu() + 1, backend="aten")
    torch.testing.assert_close(fast(X), X * 7 + 1)


@pytest.mark.parametrize("cls", [nn.LayerNorm, nn.Module])
def test_what_a_call_runs_is_noticed(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Module.__call__

    def doubled(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return 2 * plain(self, *args, **kwargs)

    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Softmax(-1)).eval()
    fast = turbotx.optimize(model, backend="aten")
    before = fast(X)
    with monkeypatch.context() as patch:
        patch.setattr(cls, "__call__", doubled)
        torch.testing.assert_close(fast(X), model(X))
        anew = turbotx.optimize(model, backend="aten")
        torch.testing.assert_close(anew(X), model(X))
    torch.testing.assert_close(fast(X), before)
    assert fast.stats()["captures"] == 2


def test_a_call_that_replaces_the_models_own_runs_once_beside_its_hooks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, calls = nn.Module.__call__, list[str]()

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append("call")
        return 1 + plain(self, *args, **kwargs)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        calls.append("hook")
        return 2 * output

    model = Layers().eval()
    fast = turbotx.optimize(model, backend="aten")
    before = fast(X)
    with monkeypatch.context() as patch:
        patch.setattr(Layers, "__call__", counted, raising=False)
        torch.testing.assert_close(fast(X), before + 1)
        model.register_forward_hook(hook)
        calls.clear()
        torch.testing.assert_close(fast(X), 2 * before + 1)
        assert calls == ["call", "hook"]
    calls.clear()
    torch.testing.assert_close(fast(X), 2 * before)
    assert calls == ["hook"]
