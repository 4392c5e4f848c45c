"""Dicts that a hook fills and forward reads: one capture, unless what lay there before decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import turbotx
from turbotx.capture.sandbox.noted_dict import NotedDict
from turbotx.errors import CaptureError

SIZES = (2, 3, 1, 4)


@pytest.mark.parametrize(
    ("reads", "read"),
    [
        (lambda d: d.__setitem__("x", 1) or d["x"], False),
        (lambda d: d.update(x=1) or d.get("x"), False),
        (lambda d: d.clear() or len(d), False),
        (lambda d: d.update(x=1, y=2) or list(d.items()), False),
        (lambda d: d.update(x=1) or list(d), True),
        (lambda d: d["x"], True),
        (lambda d: "x" in d, True),
        (lambda d: d.get("x"), True),
        (lambda d: d.pop("x"), True),
        (lambda d: d.setdefault("x", 3), True),
        (lambda d: {**d}, True),
        (lambda d: dict(d), True),
        (lambda d: len(d) and bool(d), True),
        (lambda d: d == {}, True),
        (lambda d: d | {"x": 1}, True),
        (lambda d: d["y"], False),
    ],
)
def test_what_was_read_of_the_first_contents(reads: Callable[[Any], Any], read: bool) -> None:
    noted = NotedDict(x=0, y=0)
    noted.begin()
    reads(noted)
    assert noted.was_read("x") is read
    noted.begin()
    assert not noted.was_read("x")


class Extractor(nn.Module):
    """As it is usually written: the hook's closure holds the module itself."""

    def __init__(self, use: Callable[[Any, torch.Tensor], Any], known: bool = True) -> None:
        super().__init__()
        self.model, self.use = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), use
        self.kept = {"0": torch.empty(0), "2": torch.empty(0)} if known else {}
        for name in ("0", "2"):
            self.model.get_submodule(name).register_forward_hook(self.keep(name))

    def keep(self, name: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: torch.Tensor) -> None:
            self.kept[name] = output

        return hook

    def forward(self, x: torch.Tensor) -> Any:
        return self.use(self, x)


def make(use: Callable[..., Any], known: bool) -> tuple[Extractor, Extractor]:
    model, twin = Extractor(use, known).eval(), Extractor(use, known).eval()
    twin.load_state_dict(model.state_dict())
    return model, twin


def returns_all(m: Any, x: torch.Tensor) -> Any:
    m.model(x)
    return m.kept


def reads_one(m: Any, x: torch.Tensor) -> Any:
    return m.model(x) + m.kept["0"]


def clears(m: Any, x: torch.Tensor) -> Any:
    m.kept.clear()
    return m.model(x), sum(m.kept.values())


def replaces(m: Any, x: torch.Tensor) -> Any:
    m.kept = {}
    return m.model(x) + m.kept["2"]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("use", [returns_all, reads_one, clears, replaces])
def test_what_a_hook_has_put_is_read_in_one_capture(use: Any, known: bool) -> None:
    model, twin = make(use, known)
    fast = turbotx.optimize(model, backend="aten")
    for n in SIZES:
        x = torch.randn(n, 4)
        torch.testing.assert_close(fast(x), twin(x))
        torch.testing.assert_close(dict(model.kept), dict(twin.kept))
    assert fast.stats()["captures"] <= (1 if known and use is not replaces else 3)


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: m.model(x + m.kept["0"].sum()),
        lambda m, x: m.model(x + 1 if m.kept["0"].numel() == 12 else x),
        lambda m, x: m.model(x + sum(v.numel() for v in m.kept.values())),
    ],
)
def test_what_lay_there_before_is_refused_where_it_decides(use: Any) -> None:
    model, twin = make(use, True)
    fast = turbotx.optimize(model, backend="aten")

    def run() -> None:
        for n in SIZES:
            x = torch.randn(n, 4)
            torch.testing.assert_close(fast(x), twin(x))

    with pytest.raises(CaptureError, match="depends on the calls before it"):
        run()


def test_a_dict_that_is_reached_by_two_ways_is_refused_where_one_of_them_reads() -> None:
    kept = {"x": torch.ones(4)}

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.kept = nn.Linear(4, 4), kept

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + kept["x"].sum()
            self.kept["x"] = self.inner(x)
            return y

    with pytest.raises(CaptureError, match="depends on the calls before it"):
        turbotx.optimize(Two().eval(), backend="aten")(torch.randn(2, 4))
