"""Dict watch: detects changes to any of many dicts, lists and closure cells since the last check.

In: the containers of the state that a trace read. Out: one native call that returns the first
changed one, where comparing in Python takes a microsecond each; a BERT has a thousand::

    watch = DictWatch(native, mechanism, dicts, lists, cells)
    watch.first_touched(0)  ->  17     # the eighteenth
    watch.accept(17)()                 # accepts its current state; -1 afterwards

Python 3.10 to 3.12 store a version in each dict; from 3.12 on, Python notifies a dict watcher
(PyDict_Watch), which counts changes. The mechanism is chosen by testing it.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from turbotx.capture.module_state.values import content_of

TAG_OFFSET = 24
"""Offset of `ma_version_tag` in a dict object: after reference count, type and size."""
VALUES_OFFSET = 40
"""Offset of `ma_values`, which is null in a dict with its own table."""
CELL_OFFSET = 16
"""Offset of the contents of a cell object."""

Locate = Callable[[dict[Any, Any]], int]
"""Returns the address of a number that changes with every change of a dict."""


class _Watched(ctypes.Structure):
    """Mirrors `Watched` in dict_watch.cpp; `arrays` keeps its arrays alive."""

    arrays: tuple[Any, ...]
    _fields_ = (
        ("count", ctypes.c_int64),
        ("where", ctypes.c_void_p),
        ("seen", ctypes.c_void_p),
        ("list_count", ctypes.c_int64),
        ("lists", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("items", ctypes.c_void_p),
    )


class DictWatch:
    """The state of containers when this was made or last accepted; keeps them alive."""

    def __init__(
        self, native: ctypes.CDLL, locate: Locate, dicts: Sequence[dict[Any, Any]],
        lists: Sequence[list[Any]], cells: Sequence[types.CellType],
    ) -> None:  # fmt: skip
        self.watched: tuple[Any, ...] = (*dicts, *cells, *lists)
        # PyDLL holds the GIL: a list must not be reallocated while it is read.
        self._first_touched = ctypes.PyDLL(native._name, handle=native._handle).ttx_first_touched
        self._first_touched.restype = ctypes.c_int64
        self._first_touched.argtypes = [ctypes.c_int64, ctypes.c_void_p]
        places = [*map(locate, dicts), *(id(c) + CELL_OFFSET for c in cells)]
        self._count = len(places)
        self._where = (ctypes.c_void_p * len(places))(*places)
        self._seen = (ctypes.c_uint64 * len(places))(*map(_number_at, places))
        self._lists = (ctypes.c_void_p * len(lists))(*map(id, lists))
        # Kept alive, so that no other object can get the address of an item.
        self._kept: list[Any] = [*map(list, lists), *map(content_of, cells)]
        self._table = self._make_table()

    def _make_table(self) -> tuple[int, Any]:
        """Return the address of the native table, and the table."""
        kept = self._kept[: len(self._lists)]
        items = [id(x) for held in kept for x in held]
        sizes = (ctypes.c_int64 * len(kept))(*map(len, kept))
        arrays = (
            self._where,
            self._seen,
            self._lists,
            sizes,
            (ctypes.c_void_p * len(items))(*items),
        )
        where, seen, lists, *others = (ctypes.addressof(a) for a in arrays)
        table = _Watched(self._count, where, seen, len(kept), lists, *others)
        table.arrays = arrays
        return ctypes.addressof(table), table

    def first_touched(self, start: int) -> int:
        """Return the index in `watched`, from `start` on, of the first container that changed, or
        -1."""
        table = self._table  # keeps it alive, even if another thread replaces it
        found: int = self._first_touched(start, table[0])
        return found

    def touched(self) -> Iterator[int]:
        """Yield the index of every container that changed, each found when it is asked for."""
        i = self.first_touched(0)
        while i >= 0:
            yield i
            i = self.first_touched(i + 1)

    def accept(self, i: int) -> Callable[[], None]:
        """Read the current state of `watched[i]`; return a function that accepts that state as
        seen."""
        if i >= self._count:
            return functools.partial(self._accept_list, i - self._count, list(self.watched[i]))
        return functools.partial(self._accept_number, i, _number_at(self._where[i]))

    def _accept_list(self, k: int, items: list[Any]) -> None:
        self._kept[k] = items
        self._table = self._make_table()

    def _accept_number(self, i: int, number: int) -> None:
        self._seen[i] = number
        if isinstance(self.watched[i], types.CellType):
            self._kept.append(content_of(self.watched[i]))


def _number_at(address: int | None) -> int:
    assert address is not None
    return ctypes.c_uint64.from_address(address).value


def _tag_of(found: dict[Any, Any]) -> int:
    return id(found) + TAG_OFFSET


_found: dict[int, Locate | None] = {}


def find_mechanism(native: ctypes.CDLL) -> Locate | None:
    """Return how dict changes are detected natively in this Python; None if that is not
    possible."""
    if native._handle not in _found:
        usable = sys.implementation.name == "cpython" and ctypes.sizeof(ctypes.c_void_p) == 8
        _found[native._handle] = None
        for locate in _mechanisms(native) if usable else ():
            if _works(native, locate):
                _found[native._handle] = locate
                break
    return _found[native._handle]


def _mechanisms(native: ctypes.CDLL) -> Iterator[Locate]:
    """Yield the possible mechanisms, best first."""
    yield _tag_of  # a version in each dict
    watch = _start_watcher(native)
    if watch is None:
        return
    yield watch

    def watch_table(found: dict[Any, Any]) -> int:
        # Python 3.13.0 does not notify watchers of attributes set in an object with inline values.
        # A key that is not a string moves them to a table of the dict.
        if _number_at(id(found) + VALUES_OFFSET):
            found[_NO_NAME] = None
            del found[_NO_NAME]
        return watch(found)

    yield watch_table


_NO_NAME = 0


def _start_watcher(native: ctypes.CDLL) -> Locate | None:
    """Register the native callback with this Python; return None if that is not possible."""
    api = ctypes.pythonapi
    if not hasattr(api, "PyDict_AddWatcher"):
        return None
    api.PyDict_AddWatcher.argtypes = [ctypes.c_void_p]
    api.PyDict_Watch.argtypes = [ctypes.c_int, ctypes.py_object]
    try:
        watcher = api.PyDict_AddWatcher(ctypes.cast(native.ttx_dict_event, ctypes.c_void_p))
    except RuntimeError:
        return None

    def locate(found: dict[Any, Any]) -> int:
        api.PyDict_Watch(watcher, found)
        place: int = native.ttx_dict_counter(id(found))
        return place

    return locate


class _Sample:
    """An object whose attributes are set in every way that Python specializes."""

    def __init__(self) -> None:
        self.x, self.y = 1, 2

    def set_often(self) -> None:
        for i in range(300):
            self.x = i


_CHANGES: tuple[Callable[[Any], object], ...] = (
    lambda s: setattr(s, "x", 3),
    lambda s: s.set_often(),
    lambda s: setattr(s, "z", 4),
    lambda s: delattr(s, "y"),
    lambda s: vars(s).update(x=9),
    lambda s: vars(s).pop("x"),
    lambda s: vars(s).clear(),
)
_ITEM_CHANGES: tuple[Callable[[Any], object], ...] = (
    lambda d: d.__setitem__("a", 5),
    lambda d: d.__setitem__("new", 5),
    lambda d: d.pop("a"),
    lambda d: d.update(b=0),
    lambda d: d.clear(),
)


def _works(native: ctypes.CDLL, locate: Locate) -> bool:
    """Test each kind of change, and no change, on an object, a class, dicts, a list and a cell."""
    made: list[tuple[dict[Any, Any], Callable[[], object]]] = []
    for change in _CHANGES:
        sample = _Sample()
        made.append((vars(sample), functools.partial(change, sample)))
    for kind in (dict, collections.OrderedDict):
        for change in _ITEM_CHANGES:
            held = kind(a=1, b=2)
            made.append((held, functools.partial(change, held)))
    for found, act in made:
        watch = DictWatch(native, locate, [found], [], [])
        found.get("a")
        if watch.first_touched(0) != -1:
            return False
        act()
        if watch.first_touched(0) != 0:
            return False
        watch.accept(0)()
        if watch.first_touched(0) != -1:
            return False
    return _lists_work(native, locate)


def _lists_work(native: ctypes.CDLL, locate: Locate) -> bool:
    items, cell = [1, object()], types.CellType(1.5)
    watch = DictWatch(native, locate, [], [items], [cell])
    answers = [watch.first_touched(0)]
    cell.cell_contents = 2.5
    answers.append(watch.first_touched(0))
    watch.accept(0)()
    items.append(3)
    answers.append(watch.first_touched(0))
    watch.accept(1)()
    items[1] = None
    answers.append(watch.first_touched(1))
    return answers == [-1, 0, 1, 1]
