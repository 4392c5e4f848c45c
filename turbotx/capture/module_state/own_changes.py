"""Own changes: state that a call modifies in containers and attributes that it also reads.

In: the effects of a traced call, the places that it read, its code. Out: the container contents
that are not guarded, because the code only writes them; the places that a call changes itself, so
that the next call is captured again (a state that the first call creates); or an error if every
call would be::

    self.seen.append(x)             ->  the contents of `seen` are not guarded
    if self.mean is None: ...       ->  the place "mean", changed by the first call
    self.calls += 1                 ->  CaptureError: its forward reads 'calls' (0) and sets it ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from turbotx.capture.module_state.names import Names
from turbotx.capture.module_state.places import (
    TABLES,
    AttributePlace,
    CellPlace,
    DefaultsPlace,
    StatePlace,
)
from turbotx.capture.module_state.recorder import Write
from turbotx.capture.module_state.uses import is_only_written
from turbotx.capture.module_state.values import MISSING, Look, dict_of, show
from turbotx.capture.sandbox.effects import Effect
from turbotx.capture.sandbox.watched import Put
from turbotx.errors import CaptureError
from turbotx.ir.expr import expr


@dataclass
class OwnChanges:
    """left_out: what is not guarded, by the id of a container: the keys that calls put into it, or
    None for all its contents. places: keys of places that a call changes itself."""

    left_out: dict[int, frozenset[Any] | None] = field(default_factory=dict)
    places: set[Any] = field(default_factory=set)


def _dicts_of(owner: Any) -> list[Any]:
    attributes = dict_of(owner)
    if attributes is None:
        return []
    tables = TABLES if isinstance(owner, nn.Module) else ()
    return [attributes, *(attributes[t] for t in tables if t in attributes)]


def depends_on_before(write: Write, before: Any) -> bool:
    """Return whether a replayed write makes each call depend on the previous one in a way
    that needs a capture per call: a number computed from a number, or a tensor from one of
    other sizes."""
    if not write.read_first:
        return False
    if is_number(before) and is_number(write.value):
        return not _is_one_size(write.value)
    if isinstance(before, torch.Tensor) and isinstance(write.value, torch.Tensor):
        read_anew = isinstance(write.owner, nn.Module)
        return write.from_inputs and not (read_anew and _is_alike(before, write.value))
    return False


def is_number(value: Any) -> bool:
    """Return whether a value is an int, a float or a symbolic int; bools do not count."""
    return isinstance(value, (int, float, torch.SymInt)) and not isinstance(value, bool)


def _is_one_size(value: Any) -> bool:
    """Return whether a value is exactly one size of the call: a running maximum of the length is
    compared and replaced."""
    return isinstance(value, torch.SymInt) and expr(value).is_Symbol


def _is_alike(before: torch.Tensor, value: torch.Tensor) -> bool:
    if before.dtype != value.dtype or before.device != value.device:
        return False
    numbers = (*value.shape, *value.stride())
    if any(isinstance(n, torch.SymInt) for n in numbers):
        return False
    return before.shape == value.shape and before.stride() == value.stride()


def find_own_changes(
    name: str, effects: Sequence[Effect], places: Sequence[StatePlace], names: Names
) -> OwnChanges:
    """Return what a call of the model called `name` changes among what it reads.

    Raises CaptureError if the contents of a container that it reads change with every call.
    """
    found = OwnChanges()
    attributes = {
        (id(held), p.name): p.key
        for p in places
        if isinstance(p, AttributePlace)
        for held in _dicts_of(p.owner)
    }
    holders: dict[int, list[StatePlace]] = {}
    for place in places:
        look = Look()
        place.describe(look)
        for held in look.held:
            holders.setdefault(held, []).append(place)
    for effect in effects:
        change = effect.difference
        key = (id(effect.target), change.key) if isinstance(change, Put) else None
        if key in attributes:
            found.places.add(attributes[key])
        holding = holders.get(id(effect.target), [])
        if not holding:
            continue
        if effect.unread or all(_is_only_written(place, names) for place in holding):
            known = found.left_out.get(id(effect.target), frozenset())
            whole = known is None or not isinstance(effect.target, dict)
            put = frozenset() if key is None else frozenset((key[1],))
            found.left_out[id(effect.target)] = None if whole else (known or frozenset()) | put
            continue
        _refuse_endless(name, effect, holding[0].text)
        found.places |= {place.key for place in holding}
    return found


def _is_only_written(place: StatePlace, names: Names) -> bool:
    codes = names.codes
    if codes is None:
        return False
    if isinstance(place, DefaultsPlace):
        own = place.function.__code__
        return all(is_only_written(n, [own], local=True) for n in place.containers)
    if isinstance(place, CellPlace):
        return is_only_written(place.name, codes)
    attribute = getattr(place, "name", None)
    return attribute is not None and is_only_written(attribute, codes)


def _refuse_endless(name: str, effect: Effect, text: str) -> None:
    """Raise CaptureError if a call changes what it read, and every later call would again."""
    change = effect.difference
    if isinstance(change, Put):
        before = _item(effect.target, change.key)
        value = effect.leaves[0] if len(effect.leaves) == 1 else None
        plain = is_number(before) and (is_number(value) or effect.makes_size)
        if not plain and not (isinstance(before, torch.Tensor) and effect.makes_tensor):
            return
        what = f"puts another in the place of {effect.text!r} ({show(before)})"
    else:
        what = "adds to it"
    raise CaptureError(
        f"cannot capture {name}: its code reads what {text!r} holds and {what} at every call, so "
        "that a call depends on the calls before it. Keep that outside of the optimized module, or "
        "only write to it"
    )


def _item(target: Any, key: Any) -> Any:
    try:
        return target[key]
    except (KeyError, IndexError):
        return MISSING
