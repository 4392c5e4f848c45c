"""LRU: a dict that keeps a bounded number of entries.

In: how many. Out: a dict whose least recently used entry is dropped when one more is set::

    shapes = LruDict(2);  shapes["a"] = shapes["b"] = 1;  shapes.find("a");  shapes["c"] = 1
    list(shapes)  ->  ["a", "c"]
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class LruDict(OrderedDict[K, V]):
    """A dict of at most `most` entries; `[]=` and `find` are uses of an entry, reading it by
    `get` or `[]` is none. Threads may `find` while one other sets."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def find(self, key: K) -> V | None:
        """Return the entry, now the most recently used one; None if there is none."""
        try:
            self.move_to_end(key)
        except KeyError:
            return None
        return self.get(key)  # None where a thread has dropped it meanwhile

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > self.most:
            self.popitem(last=False)
