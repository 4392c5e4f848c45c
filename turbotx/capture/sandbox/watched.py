"""Watched: a container or object that a trace may write to, with its contents before and after.

In: a container, or the `__dict__` of an object. Out: its contents restored, and the differences
that the trace made, in the user's object or in a copy of it::

    w = Watched(kept, kept, "kept");  kept["mask"] = m;  w.differences()  ->  [Put("mask", m)]
    w.put_back();  kept  ->  {}
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from turbotx.capture.sandbox.noted_dict import NotedDict

DICTS = (dict, OrderedDict, defaultdict, Counter)
SEQUENCES = (list, deque)
CONTAINERS = (*DICTS, *SEQUENCES, set)
"""Types that are searched; the methods of a subclass may do anything."""


@dataclass(frozen=True)
class Put:
    """`target[key] = value`, of a dict or a list."""

    key: Any
    value: Any


@dataclass(frozen=True)
class Append:
    """`target.append(value)`."""

    value: Any


@dataclass(frozen=True)
class Add:
    """`target.add(value)`."""

    value: Any


@dataclass(frozen=True)
class Taken:
    """Items of the target were removed or moved."""


Difference = Put | Append | Add | Taken


class Watched:
    """target: the user's object. traced: what the trace writes to, the same or a copy of it.
    exchanged: whether the tracer itself replaces the contents in each run. shared: whether the code
    also reaches the user's object itself."""

    def __init__(self, target: Any, traced: Any, text: str, exchanged: bool = False) -> None:
        self.target, self.traced, self.text = target, traced, text
        self._exchanged, self.shared = exchanged, False
        self._own = self._before = self.look()

    def look(self) -> Any:
        """Return a copy of what the traced one holds."""
        if isinstance(self.traced, NotedDict):
            return dict(dict.items(self.traced))  # not recorded as a read
        return dict(self.traced) if isinstance(self.traced, dict) else list(self.traced)

    def begin(self) -> None:
        """Start recording the differences that the code makes."""
        if not self._exchanged:
            self.put_back()
            if isinstance(self.traced, NotedDict):
                self.traced.begin()
            return
        for key in [k for k in self.traced if k not in self._own]:
            del self.traced[key]
        self._before = self.look()

    def before(self, key: Any) -> Any:
        """Return what a dict held under a key before the code ran, or None."""
        return self._before.get(key)

    def stand_ins(self) -> dict[int, Any]:
        """Return the user's tensor for each that the tracer has put in its place, by id."""
        if not self._exchanged:
            return {}
        pairs = [(x, self._own.get(key)) for key, x in self._before.items()]
        return {id(x): own for x, own in pairs if own is not None and own is not x}

    def is_unread(self, difference: Difference) -> bool:
        """Return whether the code did not read the previous value before this write."""
        if self.shared or not isinstance(self.traced, NotedDict):
            return False
        return isinstance(difference, Put) and not self.traced.was_read(difference.key)

    def put_back(self) -> None:
        """Restore the initial contents, the identical objects."""
        self._before = self._own
        if self._same(self.look()):
            return
        if isinstance(self.traced, dict):
            for key in [k for k in self.traced if k not in self._own]:
                del self.traced[key]
            self.traced.update(self._own)
        elif isinstance(self.traced, list):
            self.traced[:] = self._own
        else:
            self.traced.clear()
            (self.traced.update if isinstance(self.traced, set) else self.traced.extend)(self._own)

    def _same(self, now: Any) -> bool:
        before = self._before
        if isinstance(self.traced, set):
            return {id(x) for x in before} == {id(x) for x in now}
        if len(now) != len(before):
            return False
        if isinstance(now, dict):
            return all(k in before and before[k] is v for k, v in now.items())
        return all(a is b for a, b in zip(before, now, strict=True))

    def differences(self) -> list[Difference]:
        """Return what has to be done to the target for it to hold what the traced one holds."""
        now, before = self.look(), self._before
        if self._same(now):
            return []
        if isinstance(now, dict):
            if any(k not in now for k in before):
                return [Taken()]
            return [Put(k, v) for k, v in now.items() if k not in before or before[k] is not v]
        if isinstance(self.traced, set):
            known = {id(x) for x in before}
            added: list[Difference] = [Add(x) for x in now if id(x) not in known]
            return added if len(now) - len(added) == len(before) else [Taken()]
        if isinstance(self.traced, deque) and self.traced.maxlen is not None:
            # A full one loses its first item with every append.
            lost = next(k for k in range(len(before) + 1) if _begins(now, before[k:]))
            full = lost == 0 or len(now) == self.traced.maxlen
            return [Append(v) for v in now[len(before) - lost :]] if full else [Taken()]
        if len(now) < len(before):
            return [Taken()]
        puts: list[Difference] = [Put(k, now[k]) for k, v in enumerate(before) if now[k] is not v]
        return puts + [Append(v) for v in now[len(before) :]]


def by_identity(contents: Any) -> Any:
    """Return what a container holds, copied by `Watched.look`, as ids."""
    if isinstance(contents, dict):
        return [(id(k), id(v)) for k, v in contents.items()]
    return list(map(id, contents))


def apply(target: Any, difference: Difference) -> None:
    """Apply a recorded difference to a container."""
    if isinstance(difference, Put):
        target[difference.key] = difference.value
    elif isinstance(difference, Append):
        target.append(difference.value)
    elif isinstance(difference, Add):
        target.add(difference.value)


def _begins(values: Sequence[Any], with_: Sequence[Any]) -> bool:
    return len(values) >= len(with_) and all(a is b for a, b in zip(values, with_, strict=False))
