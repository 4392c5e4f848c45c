"""Layout questions: detects that traced code queries an input's strides or contiguity.

In: the call's tensors and the model's code, traced while this mode is active. Out: the inputs whose
strides or contiguity, or those of a view, were queried. A trace sees dense inputs, so the program
then accepts only dense ones::

    with LayoutQuestions(note) as questions:  ...  if x.is_contiguous(): ...
    questions.asked  ->  {0}

`x.contiguous()` of an input stays an op of the graph. Access to an input's storage,
`x.untyped_storage()`, is refused, since it may hold more than the input; so is `x.requires_grad`,
but of the model's parameters, where the answer is a guard.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from turbotx.capture.module_state.values import is_library
from turbotx.errors import CaptureError

Tensor: Any = torch.Tensor
_QUESTIONS = frozenset((Tensor.is_contiguous, Tensor.stride, Tensor.storage_offset))
_MODES = {getattr(Tensor, name).__get__: name for name in ("requires_grad", "grad_fn")} | {
    Tensor.is_inference: "is_inference()"
}
_METHODS = ("torch.overrides", "torch._tensor", "turbotx.capture.value_questions")
_STORAGES = frozenset((Tensor.untyped_storage, Tensor.storage))


class LayoutQuestions(TorchFunctionMode):
    """While active, records the indices of the inputs whose layout the user's code queries."""

    def __init__(self, note_gradients: Callable[[torch.Tensor], bool | None]) -> None:
        """note_gradients: tells whether a parameter requires gradients, None for other tensors."""
        super().__init__()
        self._note_gradients = note_gradients
        self.asked: set[int] = set()
        self._places: dict[int | None, int] = {}

    def begin(self, inputs: Sequence[torch.Tensor]) -> None:
        """Set the call's tensors."""
        places = ((memory_of(t), i) for i, t in enumerate(inputs))
        self._places = {memory: i for memory, i in places if memory is not None}
        self.asked.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _MODES and not is_library(_find_asker()):
            asked = self._note_gradients(args[0]) if _MODES[func] == "requires_grad" else None
            if asked is not None:
                return asked
            raise CaptureError(
                f"its code asks for the {_MODES[func]} of a tensor, which a trace does not know, "
                "since it runs without gradients: use torch.is_grad_enabled() or "
                "is_inference_mode_enabled()"
            )
        asks = func in _QUESTIONS or func in _STORAGES
        if asks and not is_library(_find_asker()):
            place = self._places.get(memory_of(args[0]))
            if place is not None and func in _STORAGES:
                raise CaptureError(
                    "it reads the storage of an input, which may be larger than the input in "
                    "another call: use the input's own numel() and element_size()"
                )
            if place is not None:
                self.asked.add(place)
        plain = func is Tensor.contiguous and len(args) == 1 and not kwargs
        if plain and memory_of(args[0]) in self._places:
            # PyTorch calls no op for a dense tensor, as the trace's inputs are.
            return torch.ops.aten.contiguous.default(args[0])
        return func(*args, **(kwargs or {}))


def _find_asker() -> str | None:
    """Return the module whose code makes the query, skipping tensor methods written in Python and
    the mode around this one."""
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__") in _METHODS and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_globals.get("__name__")


def memory_of(tensor: torch.Tensor) -> int | None:
    """Return the identity of a tensor's storage; None for a tensor without one, as under vmap."""
    with torch._C.DisableTorchFunction(), suppress(NotImplementedError):
        return int(tensor.untyped_storage()._cdata)
    return None
