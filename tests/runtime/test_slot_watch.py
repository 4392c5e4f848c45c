"""Slot watch: replaced and removed parameters are seen, natively and in Python, other writes not.

In: modules' dicts, before and after a write. Out: whether it counts as another parameter.
"""

from __future__ import annotations

import ctypes
import types
from collections.abc import Callable

import pytest
import torch
from torch import nn

from turbotx.runtime.cpu.launch_table import load_library
from turbotx.runtime.slot_watch import SlotWatch

LIBRARIES: dict[str, Callable[[], ctypes.CDLL | None]] = {
    "native": lambda: load_library("runtime")[0],
    "Python": lambda: None,
}


@pytest.fixture(params=LIBRARIES)
def native(request: pytest.FixtureRequest) -> ctypes.CDLL | None:
    return LIBRARIES[request.param]()


def watch(native: ctypes.CDLL | None, layer: nn.Module) -> SlotWatch:
    return SlotWatch(native, [(layer._parameters, "weight"), (layer._parameters, "bias")])


def test_the_same_parameters_are_no_change(native: ctypes.CDLL | None) -> None:
    layer = nn.Linear(3, 4)
    watched = watch(native, layer)
    assert watched.tensors[0] is layer.weight and watched.tensors[1] is layer.bias
    layer.weight.data.fill_(2.0)  # for the tensor watch to see
    assert not watched.changed()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_replaced_parameter_is_a_change_until_it_is_back(
    native: ctypes.CDLL | None, name: str
) -> None:
    layer = nn.Linear(3, 4)
    watched, before = watch(native, layer), getattr(layer, name)
    setattr(layer, name, nn.Parameter(before.detach().clone()))
    assert watched.changed() and watched.changed()
    setattr(layer, name, before)
    assert not watched.changed()


def test_a_removed_parameter_is_a_change(native: ctypes.CDLL | None) -> None:
    layer = nn.Linear(3, 4)
    watched = watch(native, layer)
    del layer.weight
    assert watched.changed()
    layer = nn.Linear(3, 4)
    watched = watch(native, layer)
    layer.bias = None
    assert watched.changed()


def test_other_writes_to_the_dict_are_accepted(native: ctypes.CDLL | None) -> None:
    layer = nn.Linear(3, 4)
    watched = watch(native, layer)
    layer.register_parameter("other", nn.Parameter(torch.ones(2)))
    assert not watched.changed()
    layer.weight = nn.Parameter(torch.ones(4, 3))
    assert watched.changed()


def test_a_mapping_that_is_no_dict_is_compared(native: ctypes.CDLL | None) -> None:
    held = {"weight": torch.ones(2)}
    watched = SlotWatch(native, [(types.MappingProxyType(held), "weight")])
    assert not watched.changed()
    held["weight"] = torch.ones(2)
    assert watched.changed()


def test_an_empty_slot_is_refused(native: ctypes.CDLL | None) -> None:
    with pytest.raises(KeyError, match="weight"):
        SlotWatch(native, [({}, "weight")])
