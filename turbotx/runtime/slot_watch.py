"""Slot watch: detects whether a model's dicts hold other parameters than they did.

In: the dict entries that hold the parameters of a program. Out: one native look a dict, instead of
one of Python's an entry, whose cache misses add up to 100 us behind the kernels of a large model::

    watch = SlotWatch(native, [(fc._parameters, "weight"), (fc._parameters, "bias")])
    watch.changed()  ->  False
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from turbotx.runtime.dict_watch import DictWatch, find_mechanism

Slot = tuple[Mapping[str, Any], str]
"""A dict and the key in it under which it holds a parameter."""


class SlotWatch:
    """The parameters in `slots` when this was made; thread-safe.

    tensors: those parameters.
    """

    def __init__(self, native: ctypes.CDLL | None, slots: Sequence[Slot]) -> None:
        """native: the library with the native look; None to compare every entry at every check.
        Raises KeyError for a slot that holds nothing."""
        self._owners = [owner for owner, _ in slots]
        self._keys = [key for _, key in slots]
        self._dicts: DictWatch | None = None
        locate = None if native is None else find_mechanism(native)
        owners = {id(x): x for x in self._owners}
        dicts = [x for x in owners.values() if isinstance(x, dict)]
        if native is not None and locate is not None and len(dicts) == len(owners):
            self._dicts = DictWatch(native, locate, dicts, [], [])
        self.tensors = self._read()  # after the watch has started, which sees later changes

    def changed(self) -> bool:
        """Return whether a slot holds another object, or nothing."""
        dicts = self._dicts
        if dicts is None:
            return self._holds_others()
        accepted = [dicts.accept(i) for i in dicts.touched()]
        if accepted and self._holds_others():  # other entries of these dicts may have changed
            return True
        for accept in accepted:
            accept()
        return False

    def _holds_others(self) -> bool:
        try:
            return not all(map(operator.is_, self._read(), self.tensors))
        except KeyError:
            return True

    def _read(self) -> list[Any]:
        return list(map(operator.getitem, self._owners, self._keys))
