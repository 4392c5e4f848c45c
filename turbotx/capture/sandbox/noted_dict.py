"""Noted dict: records which keys of a dict a trace reads before it writes them.

In: a dict of the model's, copied for a trace. Out: the same to the model's code, and afterwards
whether the value of a key at the start of the call was read::

    kept["x"] = x * 2;  y = kept["x"]     ->  kept.was_read("x") is False
    if "x" in kept: ...;  kept["x"] = x   ->  kept.was_read("x") is True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MISSING = object()


class NotedDict(dict[Any, Any]):
    """A dict that records which of its initial entries were read since `begin`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.begin()

    def begin(self) -> None:
        """Take the current contents as the initial ones, none of them read."""
        self._written: set[Any] = set()
        self._read: set[Any] = set()
        self._cleared = self._read_all = False

    def was_read(self, key: Any) -> bool:
        """Return whether the code depends on the initial value of a key, or on its presence."""
        return self._read_all or key in self._read

    def _note(self, key: Any) -> None:
        if not self._cleared and key not in self._written:
            self._read.add(key)

    def _note_all(self) -> None:
        # If every key was written since, nothing from before is seen.
        if not self._cleared and not self._written.issuperset(dict.keys(self)):
            self._read_all = True

    # --- reads of one key ---

    def __getitem__(self, key: Any) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(key)
        return super().__contains__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the entry or `default`; records the key as read."""
        self._note(key)
        return super().get(key, default)

    # --- writes ---

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self._written.add(key)

    def __delitem__(self, key: Any) -> None:
        self._note(key)
        super().__delitem__(key)
        self._written.add(key)

    def pop(self, key: Any, default: Any = _MISSING) -> Any:
        """Remove and return the entry; records the key as read and written."""
        self._note(key)
        found = super().pop(key) if default is _MISSING else super().pop(key, default)
        self._written.add(key)
        return found

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """Return the entry, set to `default` if missing; records the key as read."""
        self._note(key)
        return super().setdefault(key, default)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set several entries; records their keys as written."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> NotedDict:  # type: ignore[misc]
        self.update(other)
        return self

    def clear(self) -> None:
        """Remove all entries: later reads cannot see the initial ones."""
        super().clear()
        self._cleared = True


def _noting_all(name: str) -> Callable[..., Any]:
    own = getattr(dict, name)

    def method(self: NotedDict, *args: Any) -> Any:
        self._note_all()
        return own(self, *args)

    return method


for _name in (
    "__iter__", "__len__", "__reversed__", "__eq__", "__ne__", "__repr__", "__or__", "__ror__",
    "keys", "values", "items", "copy", "popitem",
):  # fmt: skip
    setattr(NotedDict, _name, _noting_all(_name))
del _name
