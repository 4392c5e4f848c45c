"""Layout questions: whether code under a trace asks how an input lies in memory.

In: the call's tensors and the model's code, traced while this is entered. Out: whether it asked an
input, or a view of one, for strides and the like; a trace sees dense inputs, so that the program
takes no others::

    with LayoutQuestions() as questions:  ...  if x.is_contiguous(): ...
    questions.asked  ->  {0}
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from turbotx.capture.module_state.values import is_library

Tensor: Any = torch.Tensor
_QUESTIONS = frozenset((Tensor.is_contiguous, Tensor.stride, Tensor.storage_offset))


class LayoutQuestions(TorchFunctionMode):
    """While it is entered, notes which of `inputs` the user's code asked for their layout."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[int] = set()
        self._places: dict[int, int] = {}

    def begin(self, inputs: Sequence[torch.Tensor]) -> None:
        """Take these for the call's tensors."""
        self._places = {_memory(t): i for i, t in enumerate(inputs)}
        self.asked.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _QUESTIONS and not is_library(sys._getframe(1).f_globals.get("__name__")):
            place = self._places.get(_memory(args[0]))
            if place is not None:
                self.asked.add(place)
        return func(*args, **(kwargs or {}))


def _memory(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return int(tensor.untyped_storage()._cdata)
