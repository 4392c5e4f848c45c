"""LRU: a dict with a bounded number of entries.

In: the bound. Out: a dict that drops its least recently used entry when another is added::

    shapes = LruDict(2);  shapes["a"] = shapes["b"] = 1;  shapes.find("a");  shapes["c"] = 1
    list(shapes)  ->  ["a", "c"]
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class LruDict(OrderedDict[K, V]):
    """A dict of at most `most` entries. `[]=` and `find` count as uses; `get` and `[]` do not.
    Threads may call `find` while one other thread sets entries."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def find(self, key: K) -> V | None:
        """Return an entry and make it the most recently used; None if there is none."""
        try:
            self.move_to_end(key)
        except KeyError:
            return None
        return self.get(key)  # None if another thread has dropped it

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > self.most:
            self.popitem(last=False)
