"""Record: the snapshot of all state that a trace read, and its comparison with the present.

In: a recorder that was active while a model's forward ran, and the names in the code that ran. Out:
a list of places with their values at that time, and for each of them the difference now::

    record = make_record(model, recorder, names)
    record.differing([17])  ->  Difference(place=encoder.scale, was="1.0", now="5.0")
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from turbotx.capture.module_state.gradients import GradientsPlace
from turbotx.capture.module_state.names import Names, find_names
from turbotx.capture.module_state.own_changes import (
    OwnChanges,
    depends_on_before,
    find_own_changes,
)
from turbotx.capture.module_state.places import (
    TABLES,
    AttributePlace,
    CallPlace,
    ItemPlace,
    OwnTensorsPlace,
    StatePlace,
    TiedPlace,
    Ties,
    tensors_in,
)
from turbotx.capture.module_state.recorder import StateRecorder, Write
from turbotx.capture.module_state.values import Look, dict_of, is_library, is_watchable, show
from turbotx.capture.sandbox.effects import Effect
from turbotx.errors import CaptureError, TrainingError

_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


@dataclass(frozen=True)
class Difference:
    """A value that a trace read and that has changed since."""

    place: StatePlace
    was: str
    now: str

    by_calls: bool = False
    """Whether a call changes it itself."""

    @property
    def is_training(self) -> bool:
        """Whether a module was put in training mode."""
        found = self.place
        part = isinstance(found, AttributePlace) and isinstance(found.owner, nn.Module)
        return part and found.text.split(".")[-1] == "training" and bool(found.read())

    def __str__(self) -> str:
        return f"{self.place.text} was {self.was}, is {self.now}"


class StateRecord:
    """Places and their recorded values; `looks` lists, for each, the objects to watch for
    changes."""

    def __init__(self, places: Sequence[StatePlace], own: OwnChanges) -> None:
        self.places = places
        self._left_out, self.changed_by_calls = own.left_out, frozenset(own.places)
        self.looks = [Look(own.left_out) for _ in places]
        self._described = [p.describe(x) for p, x in zip(places, self.looks, strict=True)]
        self._shown = [show(p.read()) for p in places]

    def differing(self, indices: Iterable[int]) -> int | None:
        """Return the first of these places whose value has changed; None if all are unchanged."""
        for i in indices:
            if self.places[i].describe(Look(self._left_out)) != self._described[i]:
                return i
        return None

    def look_again(self, i: int) -> bool:
        """Return whether the watched objects of a place are unchanged; if not, update them."""
        look = Look(self._left_out)
        self.places[i].describe(look)
        known = self.looks[i]
        same = all(
            getattr(look, kind).keys() == getattr(known, kind).keys()
            for kind in ("dicts", "lists", "cells", "tensors", "sets", "ordered")
        )
        if not same:
            self.looks[i] = look
        return same

    def difference(self, i: int) -> Difference:
        """Describe how a place's value differs."""
        place = self.places[i]
        by_calls = place.key in self.changed_by_calls
        return Difference(place, self._shown[i], show(place.read()), by_calls)


_TRACERS = ("torch.fx.", "torch._dynamo.", "torch._higher_order_ops.", "turbotx.capture.flat_call")


def find_model_names(model: nn.Module, recorder: StateRecorder, given: Iterable[Any] = ()) -> Names:
    """Return the names in the code of a model's modules, and pass all objects that they refer to to
    the recorder. Call before the trace, with the recorder installed. given: the arguments'
    leaves."""
    recorder.modules = list(model.modules())
    names = Names(given)
    scope = vars(torch.nn.modules.module)
    for hooks in _GLOBAL_HOOKS:
        names.enter(scope[hooks])
    for module in model.modules():
        cls = type(module)
        names.enter(cls.forward, cls)
        names.enter(CallPlace(cls).read(), cls)
        for value in vars(module).values():
            names.enter(value)
    return find_names((), recorder.meet, names)


def make_record(
    model: nn.Module, recorder: StateRecorder, names: Names, effects: Sequence[Effect] = ()
) -> StateRecord:
    """Return the record of what was read, with the model as it was before the trace.

    Raises TrainingError if a part of the model that ran is in training mode, CaptureError if the
    call changes what it has read. effects: the side effects that the program replays.
    """
    paths = {id(vars(m)): path for path, m in model.named_modules()}
    places = _find_attributes(recorder, names, paths)
    _refuse_training(model, places)
    writes = [
        w for w in recorder.writes
        if not _is_tracers(w.owner, paths) and not recorder.is_made(w.owner)
    ]  # fmt: skip
    _refuse_changes(model, writes, paths)
    scope = vars(torch.nn.modules.module)
    hooks = [ItemPlace(scope, name, f"torch.nn's {name}") for name in _GLOBAL_HOOKS]
    every: list[StatePlace] = [
        *places,
        *_find_ties(model, places, names),
        *hooks,
        *map(CallPlace, dict.fromkeys(type(m) for m in model.modules())),
        *names.places.values(),
    ]
    every += [OwnTensorsPlace(x, name, _text(paths, x, name)) for x, name in recorder.kept.values()]
    if recorder.gradients:
        every.append(GradientsPlace([*{id(m): m for m in recorder.gradients}.values()]))
    return StateRecord(every, find_own_changes(type(model).__name__, effects, every, names))


def _find_attributes(
    recorder: StateRecorder, names: Names, paths: dict[int, str]
) -> list[AttributePlace]:
    """Return the attributes that were read, and those of objects named by functions in attributes,
    transitively."""
    found: dict[tuple[int, str], AttributePlace] = {}
    while new := [
        (owner, name)
        for owner, names_read in recorder.reads
        for name in names_read
        if (id(owner), name) not in found
        and not _is_tracers(owner, paths)
        and not (recorder.is_made(owner) and _is_of_object(owner, name))
    ]:
        for owner, name in new:
            known = id(dict_of(owner)) in paths
            place = AttributePlace(owner, name, _text(paths, owner, name), known)
            found[id(owner), name] = place
            value = place.read()
            called = types.FunctionType, types.MethodType, property, functools.partial
            if isinstance(value, called) or is_watchable(type(value)):
                names.enter(value, type(place.owner))
            elif isinstance(value, (dict, list, tuple)) and place.name not in TABLES:
                names.enter(value)
        find_names((), recorder.meet, names)
    return list(found.values())


def _is_tracers(owner: Any, paths: dict[int, str]) -> bool:
    """Return whether a module was made by a tracer, to hold constants or a graph: a record that
    held `FlatCall` would keep copies of the whole model alive."""
    if not isinstance(owner, nn.Module) or id(vars(owner)) in paths:
        return False
    return type(owner) is nn.Module or type(owner).__module__.startswith(_TRACERS)


def _is_of_object(owner: Any, name: str) -> bool:
    """Return whether an attribute of a module is the module's own, or of a class of PyTorch's."""
    classes = [c for c in type(owner).__mro__ if name in vars(c)]
    return name in vars(owner) or not classes or is_library(classes[0].__module__)


def _text(paths: dict[int, str], owner: Any, name: str) -> str:
    path = paths.get(id(dict_of(owner)))
    if path is None:
        return f"{type(owner).__name__}'s {name}"
    return f"{path}.{name}" if path else name


def _find_ties(
    model: nn.Module, places: Iterable[AttributePlace], names: Names
) -> Iterator[TiedPlace]:
    """Yield, for each module whose tensors were read, which other modules share them, and which
    lists, globals and the like hold them too."""
    tensors, others = list[AttributePlace](), list[StatePlace](names.places.values())
    for place in places:
        shown = place.name in TABLES[:2] or isinstance(place.read(), torch.Tensor)
        if isinstance(place.owner, nn.Module) and shown:
            tensors.append(place)
        elif place.name not in TABLES:
            others.append(place)
    own = {id(x) for m in model.modules() for t in TABLES[:2] for x in vars(m)[t].values()}
    others = [p for p in others if any(id(x) in own for x in tensors_in(p.read()))]
    ties = Ties([*tensors, *others])
    by_owner: dict[int, list[int]] = {}
    for i, place in enumerate(tensors):
        by_owner.setdefault(id(dict_of(place.owner)), []).append(i)
    for mine in by_owner.values():
        yield TiedPlace(ties, mine)


def _refuse_training(model: nn.Module, places: Iterable[AttributePlace]) -> None:
    for place in places:
        if place.name == "training" and isinstance(place.owner, nn.Module) and place.read():
            raise training_error(model, place.text)


def training_error(model: nn.Module, text: str) -> TrainingError:
    """Return the error for a part of a model that was left in training mode."""
    part = text.removesuffix(".training")
    return TrainingError(
        f"{type(model).__name__} is in evaluation mode, but its {part!r} is in training mode, and "
        "turbotx is for inference only: call model.eval() first"
    )


def _refuse_changes(model: nn.Module, writes: Iterable[Write], paths: dict[int, str]) -> None:
    """Raise CaptureError for state that a call reads and then changes, so that every later call
    would need a capture of its own."""
    for write in writes:
        text = _text(paths, write.owner, write.name)
        before = AttributePlace(write.owner, write.name, text).read()
        if not isinstance(write.value, torch.Tensor) and Look()(before) == Look()(write.value):
            continue
        if depends_on_before(write, before):
            raise CaptureError(
                f"cannot capture {type(model).__name__}: its forward reads {text!r} "
                f"({show(before)}) and sets it to {show(write.value)}, so that a call depends on "
                "the calls before it. Keep that outside of the optimized module, or pass it as an "
                "argument"
            )
