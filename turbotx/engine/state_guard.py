"""State guard: checks at every call whether the Python state that a capture read still holds.

In: the record of a capture. Out: one native check of the versions of the dicts, lists and closures
in the record. Only entries of changed containers are compared. If those are equal, as after a
repeated `model.eval()` or a write to an attribute that no capture read, the guard is rearmed::

    guard.holds()  ->  False;  str(guard.difference())  ->  "encoder.scale was 1.0, is 5.0"
"""

from __future__ import annotations

import ctypes
import operator
import threading
import types
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import torch

from turbotx.capture.module_state.record import Difference, StateRecord
from turbotx.runtime.dict_watch import DictWatch, find_mechanism
from turbotx.runtime.tensor_watch import Watch, make_watch


class StateGuard:
    """One capture's record and the watch over it; thread-safe."""

    def __init__(self, record: StateRecord, library: Future[ctypes.CDLL | None]) -> None:
        """library: the native runtime, perhaps still being built; until then every call compares
        all."""
        self._record = record
        self._library: Future[ctypes.CDLL | None] | None = library
        self._lock = threading.RLock()
        self._everything = range(len(record.places))
        self._compared: list[int] = []
        self._failed: int | None = None
        self._watch: DictWatch | None = None
        self._users: list[list[int]] = []
        self._tensors: Watch | None = None
        self._with_tensors: list[int] = []
        # Sets have no version; they are rare, so each is kept with a copy to compare with.
        self._sets: tuple[list[set[Any]], list[set[Any]]] = ([], [])
        # Nor has the order of an OrderedDict.
        self._ordered: tuple[list[Iterable[Any]], list[list[Any]]] = ([], [])
        self._with_sets: list[int] = []  # or with an order
        self._arm()
        self._failed = record.differing(self._everything)  # changes made before the watch started

    def holds(self) -> bool:
        """Return whether everything that the trace read is unchanged."""
        watch = self._watch
        if watch is not None and not self._compared and watch.first_touched(0) < 0:
            tensors = self._tensors
            same = all(map(operator.eq, *self._sets))
            ordered, orders = self._ordered
            same = same and all(map(operator.eq, map(list, ordered), orders))
            same = same and (tensors is None or not tensors.changed())
            if same and self._failed is None:
                return True
        with self._lock:
            return self._compare()

    def is_untouched(self) -> bool:
        """Return whether no watched container was written since the last check. False if a call
        writes state that is also read, so that `accept_own` must not be used."""
        watch = self._watch
        return (
            watch is not None and not self._record.changed_by_calls and watch.first_touched(0) < 0
        )

    def accept_own(self) -> None:
        """Accept writes since `is_untouched` as the call's own; the trace never read what they
        changed."""
        with self._lock:
            watch = self._watch
            if watch is not None:
                for i in watch.touched():
                    watch.accept(i)()

    def difference(self) -> Difference | None:
        """Return the difference that `holds` found, or None."""
        failed = self._failed
        return None if failed is None else self._record.difference(failed)

    def _compare(self) -> bool:
        record = self._record
        if self._failed is not None:
            if record.differing((self._failed,)) is not None:
                return False
            self._failed = None
        if self._watch is None:
            self._arm()
            self._failed = record.differing(self._everything)
            return self._failed is None
        also = (*self._compared, *self._with_tensors, *self._with_sets)
        self._failed = record.differing(also)
        if self._failed is not None:
            return False
        return self._compare_touched(self._watch)

    def _compare_touched(self, watch: DictWatch) -> bool:
        """Compare the entries of the written containers; accept the new versions if they are
        equal."""
        accepted: list[Callable[[], None]] = []
        renewed = False
        for i in watch.touched():
            accept = watch.accept(i)  # taken before reading, so that later writes are detected
            self._failed = self._record.differing(self._users[i])
            if self._failed is not None:
                return False
            renewed |= not all(map(self._record.look_again, self._users[i]))
            accepted.append(accept)
        if renewed:  # a container was replaced by an equal one
            self._arm()
            self._failed = self._record.differing(self._everything)
            return self._failed is None
        for accept in accepted:
            accept()
        if self._tensors is not None and self._tensors.changed():
            self._arm()  # the tensor a parameter holds is not part of the record
        return True

    def _arm(self) -> None:
        """Start watching the containers in their current state."""
        library = self._library
        if library is None or not library.done():
            return
        native = library.result()
        locate = None if native is None else find_mechanism(native)
        if native is None or locate is None:
            self._library = None
            return
        looks = self._record.looks
        users: dict[int, list[int]] = {}
        dicts: dict[int, dict[Any, Any]] = {}
        cells: dict[int, types.CellType] = {}
        lists: dict[int, list[Any]] = {}
        tensors: dict[int, torch.Tensor] = {}
        for i, look in enumerate(looks):
            dicts |= look.dicts
            cells |= look.cells
            lists |= look.lists
            tensors |= look.tensors
            for key in (*look.dicts, *look.cells, *look.lists):
                users.setdefault(key, []).append(i)
        watch = DictWatch(native, locate, [*dicts.values()], [*lists.values()], [*cells.values()])
        self._users = [users[id(x)] for x in watch.watched]
        self._compared = [i for i, look in enumerate(looks) if look.unversioned]
        self._with_tensors = [i for i, look in enumerate(looks) if look.tensors]
        sets = [*{id(x): x for look in looks for x in look.sets.values()}.values()]
        self._sets = (sets, [set(x) for x in sets])
        ordered: list[Iterable[Any]] = [
            *{id(x): x for look in looks for x in look.ordered.values()}.values()
        ]
        self._ordered = (ordered, [list(x) for x in ordered])
        self._with_sets = [i for i, look in enumerate(looks) if look.sets or look.ordered]
        self._tensors = make_watch(native, [*tensors.values()]) if tensors else None
        self._watch = watch
