"""Dict watch: every change of a dict, a list or a closure cell is seen, and nothing else."""

from __future__ import annotations

import collections
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest

from turbotx.runtime import dict_watch
from turbotx.runtime.cpu.launch_table import load_library
from turbotx.runtime.dict_watch import DictWatch, find_mechanism
from turbotx.runtime.tensor_watch import start_native_watch

LIBRARIES: dict[str, Callable[[], Any]] = {
    "runtime": lambda: load_library("runtime")[0],
    "watch": lambda: start_native_watch().result(),
}


class Object:
    def __init__(self) -> None:
        self.x = 1


CHANGES: dict[str, tuple[int | None, Callable[[Any, Any, Any, Any], Any]]] = {
    "nothing": (None, lambda o, d, cell, items: None),
    "read": (None, lambda o, d, cell, items: (o.x, d["a"], cell.cell_contents, items[0])),
    "attribute": (0, lambda o, d, cell, items: setattr(o, "x", 2)),
    "new attribute": (0, lambda o, d, cell, items: setattr(o, "y", 2)),
    "item of an ordered dict": (1, lambda o, d, cell, items: d.update(a=2)),
    "item removed": (1, lambda o, d, cell, items: d.pop("a")),
    "cell": (2, lambda o, d, cell, items: setattr(cell, "cell_contents", 5)),
    "list item": (3, lambda o, d, cell, items: items.__setitem__(1, "new")),
    "list grown": (3, lambda o, d, cell, items: items.extend(range(1000))),
    "list emptied": (3, lambda o, d, cell, items: items.clear()),
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen(name: str, library: str) -> None:
    native = LIBRARIES[library]()
    locate = find_mechanism(native)
    assert locate is not None, "no mechanism in this Python"
    given = (Object(), collections.OrderedDict(a=1), types.CellType(1), [1, 2])
    others = ([], [3, 4])
    watch = DictWatch(native, locate, [vars(given[0]), given[1]], [given[3], *others], [given[2]])
    assert watch.first_touched(0) == -1
    expected, change = CHANGES[name]
    change(*given)
    found = watch.first_touched(0)
    assert found == (-1 if expected is None else expected)
    if expected is not None:
        assert watch.first_touched(expected + 1) == -1
        watch.accept(expected)()
        assert watch.first_touched(0) == -1
        others[1].append(5)
        assert watch.first_touched(0) == 5


@pytest.mark.parametrize("mechanism", ["_start_watcher", "_tag_of"])
def test_a_mechanism_that_misses_changes_is_not_taken(
    mechanism: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = load_library("runtime")[0]
    monkeypatch.setattr(dict_watch, "_found", {})
    zero = (dict_watch.ctypes.c_uint64 * 1)()
    blind = dict_watch.ctypes.addressof(zero)
    monkeypatch.setattr(dict_watch, "_tag_of", lambda found: blind)
    if mechanism == "_start_watcher":
        monkeypatch.setattr(dict_watch, "_start_watcher", lambda native: lambda found: blind)
    else:
        monkeypatch.setattr(dict_watch, "_start_watcher", lambda native: None)
    assert find_mechanism(native) is None


def test_lists_are_accepted_while_others_look() -> None:
    native = load_library("runtime")[0]
    locate = find_mechanism(native)
    assert locate is not None
    items: list[int] = []
    watch = DictWatch(native, locate, [], [items], [])
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            watch.first_touched(0)

    thread = threading.Thread(target=look)
    thread.start()
    for i in range(500):
        items.append(i)
        watch.accept(0)()
    stop.set()
    thread.join()
    assert watch.first_touched(0) == -1
