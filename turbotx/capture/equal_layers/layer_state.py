"""Layer state: all that a layer's code read, described as it is for every layer equal to it.

In: a layer (a module and what is in it) and the reads that its code did, as the state recorder saw
them. Out: a description, and the parameters among what was read, in the order of first reads::

    describe_reads(reads, Subtree(layer), own).described  ->  [("module", ".norm", LayerNorm), ...]

Modules inside of the layer go by their path in it and their class, its tensors by dtype, sizes and
strides; anything else as guards describe it (`module_state/values.py`), at the least by its id.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from turbotx.capture.module_state.places import TABLES, AttributePlace, StatePlace
from turbotx.capture.module_state.values import Look, describe_own_tensor, dict_of
from turbotx.capture.sandbox.noted_dict import NotedDict


class UnequalError(Exception):
    """A layer is not to be copied; the message says why."""


@dataclass(frozen=True)
class Read:
    """An attribute that a layer's code asked for: of the module at `path` in the layer, or else of
    `owner`, which is the same for all layers."""

    path: str | None
    owner: Any
    name: str

    @property
    def key(self) -> Any:
        """What is equal for the same read of another layer."""
        return (self.path, 0 if self.path is not None else id(self.owner), self.name)


class Subtree:
    """The modules of a layer by their paths in it, and the paths by whose attributes they have."""

    def __init__(self, layer: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.paths: dict[int, str] = {}
        self._add(layer, "")

    def _add(self, module: nn.Module, path: str) -> None:
        own = dict_of(module)
        assert own is not None
        if id(own) in self.paths:
            return
        self.paths[id(own)], self.modules[path] = path, module
        for name, child in own["_modules"].items():
            if child is not None:
                self._add(child, f"{path}.{name}")

    def path_of(self, owner: Any) -> str | None:
        """Return the path of a module of the layer, whatever stands for it; None for others."""
        return self.paths.get(id(dict_of(owner)))

    def tensors(self) -> Iterator[torch.Tensor]:
        """Give the parameters and buffers of all these modules."""
        for module in self.modules.values():
            own = vars(module)
            for table in (own["_parameters"], own["_buffers"]):
                yield from (t for t in table.values() if t is not None)

    def to_reads(self, noted: Iterable[tuple[Any, str]]) -> tuple[Read, ...]:
        """Return what the recorder noted, owners and names, as reads of this layer."""
        made = []
        for owner, name in noted:
            path = self.path_of(owner)
            made.append(Read(path, owner if path is None else None, name))
        return tuple(made)


@dataclass
class LayerState:
    """What lay at the places that were read: `described`, to compare; `tensors`, the layer's own
    among it. `looks` keeps alive what the description tells by its id."""

    described: list[Any] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)


def describe_reads(
    reads: Sequence[Read], subtree: Subtree, find_own: Callable[[Any], Any]
) -> LayerState:
    """Return what lies now at the places that a layer's code reads.

    find_own: gives the user's own module for what stands for it. Raises UnequalError where a place
    is not there, or holds what cannot be told.
    """
    found = LayerState()
    for read in reads:
        owner = read.owner if read.path is None else subtree.modules.get(read.path)
        if owner is None:
            raise UnequalError(f"it has no {read.path}")
        place = AttributePlace(owner, read.name, "")
        look = Look()
        found.looks.append(look)
        found.described.append(_describe(place, subtree, find_own, found.tensors, look))
    return found


def _describe(
    place: AttributePlace, subtree: Subtree, find_own: Callable[[Any], Any],
    tensors: list[torch.Tensor], look: Look,
) -> Any:  # fmt: skip
    value = place.read()
    items: Iterable[tuple[Any, Any]] = [(None, value)]
    if isinstance(place.owner, nn.Module) and place.name in TABLES and isinstance(value, dict):
        items = value.items()
    inside = subtree.path_of(place.owner) is not None
    return tuple(
        (name, _describe_value(x, inside, subtree, find_own, tensors, look)) for name, x in items
    )


def _describe_value(
    value: Any, inside: bool, subtree: Subtree, find_own: Callable[[Any], Any],
    tensors: list[torch.Tensor], look: Look,
) -> Any:  # fmt: skip
    if isinstance(value, nn.Module):
        path = subtree.path_of(value)
        own = find_own(value)
        look.kept.append(own)
        return ("module", path, type(own)) if path is not None else ("module", id(own))
    if isinstance(value, torch.Tensor):
        if not inside:
            raise UnequalError("its code reads a tensor of a module that is not inside of it")
        tensors.append(value)
        return describe_own_tensor(value), value.requires_grad
    if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
        path = subtree.path_of(value.__self__)
        if path is not None:
            look.kept.append(value.__func__)
            return "method", id(value.__func__), path
    if type(value) is NotedDict:  # whose own readers are noted
        raise UnequalError("its code reads a dict that is an attribute")
    return look(value)


def describe_places(places: Iterable[StatePlace]) -> LayerState:
    """Return what lies at the places that the model's code names: globals, closures, classes."""
    found = LayerState()
    for place in places:
        look = Look()
        found.looks.append(look)
        found.described.append(place.describe(look))
    return found
