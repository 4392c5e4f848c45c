"""Tensor watch: every way in which a parameter changes is seen, and nothing else."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import Future

import pytest
import torch
from torch import nn

import turbotx
from turbotx.runtime import tensor_watch
from turbotx.runtime.native import load_runtime
from turbotx.runtime.tensor_watch import (
    PlainWatch,
    TensorWatch,
    make_watch,
    start_native_watch,
)
from turbotx.runtime.weights import Weights


def tensors() -> list[torch.Tensor]:
    return [torch.zeros(3), nn.Parameter(torch.ones(2, 2)), torch.empty(0)]


CHANGES = {
    "nothing": lambda x: None,
    "read": lambda x: x[1].sum(),
    "in place": lambda x: x[0].mul_(2),
    "the last one": lambda x: x[2].resize_(4),
    "other data": lambda x: setattr(x[1], "data", torch.ones(2, 2)),
}


LIBRARIES = {
    "runtime": lambda: load_runtime()[0],
    "watch": lambda: start_native_watch().result(),
    "none": lambda: None,
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen(name: str, library: str) -> None:
    given = tensors()
    watch = make_watch(LIBRARIES[library](), given)
    assert isinstance(watch, PlainWatch if library == "none" else TensorWatch)
    assert not watch.changed()
    with torch.no_grad():
        CHANGES[name](given)
    assert watch.changed() is (name not in ("nothing", "read"))


def test_a_tensor_without_a_version_is_not_watched() -> None:
    with torch.inference_mode():
        given = [torch.ones(2)]
    with pytest.raises(RuntimeError, match="version counter"):
        make_watch(load_runtime()[0], given)


def test_a_first_call_may_be_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_watch, "_checked", {})
    given = tensors()
    with torch.inference_mode():
        watch = make_watch(load_runtime()[0], given)
    assert isinstance(watch, TensorWatch)
    assert not watch.changed()


def test_nothing_is_kept_once_the_watch_is_gone() -> None:
    given = tensors()
    gone = weakref.ref(given[0])
    watch = make_watch(load_runtime()[0], given)
    del given, watch
    gc.collect()
    assert gone() is None


def test_a_program_watches_its_parameters_natively() -> None:
    fast = turbotx.optimize(nn.Linear(4, 4).eval())
    fast(torch.ones(2, 4))
    (compiled,) = fast._engine.variants()
    assert isinstance(compiled.program.runtime.weights._watched[1], TensorWatch)


@pytest.mark.parametrize("changed", [False, True])
def test_a_library_that_comes_later_takes_over_and_misses_nothing(changed: bool) -> None:
    model = nn.Linear(4, 4)
    weights = Weights(model, {}, {"w": "weight"}, {})
    weights.later = Future()
    assert weights.refresh()
    assert isinstance(weights._watched[1], PlainWatch)
    weights.later.set_result(start_native_watch().result())
    assert not weights.refresh()
    assert isinstance(weights._watched[1], TensorWatch)
    if changed:
        model.weight.data = torch.ones(4, 4)
    assert weights.refresh() is changed
