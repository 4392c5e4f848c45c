"""Tensor watch: every way in which a parameter changes is seen, and nothing else."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import Future

import pytest
import torch
from torch import nn

import turbotx
from turbotx.engine.optimize import engine_of
from turbotx.runtime import tensor_watch
from turbotx.runtime.cpu.launch_table import load_library
from turbotx.runtime.tensor_watch import (
    PlainWatch,
    TensorWatch,
    make_watch,
    start_native_watch,
)
from turbotx.runtime.weights import Kind, Weights


def tensors() -> list[torch.Tensor]:
    return [torch.zeros(3), nn.Parameter(torch.ones(2, 2)), torch.empty(0)]


CHANGES = {
    "nothing": lambda x: None,
    "read": lambda x: x[1].sum(),
    "in place": lambda x: x[0].mul_(2),
    "the last one": lambda x: x[2].resize_(4),
    "other data": lambda x: setattr(x[1], "data", torch.ones(2, 2)),
    "turned": lambda x: setattr(x[1], "data", x[1].data.t()),
    "another shape": lambda x: setattr(x[1], "data", x[1].data.view(4)),
    "another dtype": lambda x: setattr(x[0], "data", x[0].data.view(torch.int32)),
}


LIBRARIES = {
    "runtime": lambda: load_library("runtime")[0],
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


UNSEEN = {
    "filled": lambda x: x.data.fill_(0.5),
    "an average": lambda x: x.data.mul_(0.999).add_(0.001),
    "NaN": lambda x: x.data.fill_(float("nan")),
    "the first element": lambda x: x.data[:1, :1].fill_(7),
}
KINDS = {
    "float32": torch.rand(70, 9),
    "bfloat16": torch.rand(70, 9).bfloat16(),
    "transposed": torch.rand(9, 70).t(),
    "a slice": torch.rand(80, 20)[5:75, 3:12],
    "float64": torch.rand(70, 9).double(),
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", UNSEEN)
def test_what_was_derived_from_is_looked_at(name: str, kind: str, library: str) -> None:
    given = [torch.zeros(3), copy.deepcopy(KINDS[kind])]  # with its strides
    watch = make_watch(LIBRARIES[library](), given, [False, True])
    assert not any(watch.changed() for _ in range(40))
    UNSEEN[name](given[1])
    assert any(watch.changed() for _ in range(40))


@pytest.mark.parametrize("library", LIBRARIES)
def test_nan_is_like_itself_and_what_is_read_as_it_is_may_change(library: str) -> None:
    given = [torch.full((40, 3), float("nan")), torch.zeros(3)]
    watch = make_watch(LIBRARIES[library](), given, [True, False])
    given[1].data.fill_(3)
    assert not watch.changed()


def test_one_look_at_each_notices_a_change_of_all() -> None:
    given = [torch.rand(60, 60) for _ in range(300)]
    watch = make_watch(load_library("runtime")[0], given, [True] * len(given))
    assert not any(watch.changed() for _ in range(3))
    for tensor in given:
        tensor.data.mul_(0.9999)
    assert watch.changed()


def test_a_tensor_without_a_version_is_not_watched() -> None:
    with torch.inference_mode():
        given = [torch.ones(2)]
    with pytest.raises(RuntimeError, match="version counter"):
        make_watch(load_library("runtime")[0], given)


def test_a_first_call_may_be_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_watch, "_checked", {})
    given = tensors()
    with torch.inference_mode():
        watch = make_watch(load_library("runtime")[0], given)
    assert isinstance(watch, TensorWatch)
    assert not watch.changed()


def test_nothing_is_kept_once_the_watch_is_gone() -> None:
    given = tensors()
    gone = weakref.ref(given[0])
    watch = make_watch(load_library("runtime")[0], given)
    del given, watch
    gc.collect()
    assert gone() is None


def test_a_program_watches_its_parameters_natively() -> None:
    fast = turbotx.optimize(nn.Linear(4, 4).eval())
    fast(torch.ones(2, 4))
    (compiled,) = engine_of(fast).variants()
    assert isinstance(compiled.program.runtime.weights.watched[1], TensorWatch)


@pytest.mark.parametrize("changed", [False, True])
def test_a_library_that_comes_later_takes_over_and_misses_nothing(changed: bool) -> None:
    model = nn.Linear(4, 4)
    weights = Weights(model, {}, {"w": "weight"}, {}, {"w": Kind.of(model.weight)})
    weights.later = Future()
    assert weights.refresh()
    assert isinstance(weights.watched[1], PlainWatch)
    weights.later.set_result(start_native_watch().result())
    assert not weights.refresh()
    assert isinstance(weights.watched[1], TensorWatch)
    if changed:
        model.weight.data = torch.ones(4, 4)
    assert weights.refresh() is changed
